"""gd-export: a checkpoint in, a verified bundle out, with engines where they are asked for."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from grounded_diffusion.engine.cli.common import Parser, run_command
from grounded_diffusion.engine.cli.options import add_sampling_options
from grounded_diffusion.engine.sampling.options import SAMPLING
from grounded_diffusion.export import engine_cli
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.files import local_path

if TYPE_CHECKING:
    from grounded_diffusion.training.checkpoint import Checkpoint

DESCRIPTION = "Export a grounded checkpoint as a bundle that gd-infer runs without torch, and verify it."
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EPILOG = f"""examples:
  gd-export --base model.safetensors --out bundle                          any model: masks from its own attention
  gd-export --base model.safetensors --lora style.safetensors:0.8 --out bundle
  gd-export --ckpt grounding_module.pth --base {BASE} --out bundle"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        "gd-export", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--ckpt", type=local_path, help="a checkpoint directory, or the paper's grounding_module.pth")
    source.add_argument("--bundle", type=local_path, help="a bundle made before, to build --engine into")
    parser.add_argument(
        "--base",
        help="a model: one .safetensors or .ckpt file, a diffusers-format directory or a hub name; alone, or with the "
        ".pth that belongs to it",
    )
    parser.add_argument(
        "--head",
        choices=["attention", "untrained"],
        help="attention: masks from the model's own attention, without training (default where there is no --ckpt); "
        "untrained: with --base alone, a head of random weights, whose masks mean nothing, for gd-train examples",
    )
    parser.add_argument(
        "--capture-timestep", type=int, default=1, metavar="T",
        help="with --head untrained: training timestep at which the head is to read the network (default: 1, the "
        "released one's)",
    )  # fmt: skip
    model_options(parser)
    sampling_options(parser)
    parser.add_argument("--out", type=local_path, help="the bundle's directory, made by this command")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="type of the weights; fp16 is for GPUs (default: fp32)",
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="with --precision fp16: also graphs of fused operators for ONNX Runtime's CUDA provider "
        "(checked on the CPU; not run on a GPU yet)",
    )
    parser.add_argument(
        "--statistics",
        choices=["per_image", "stored"],
        help="batch norm by each image's own statistics, as the released program runs, or by stored averages "
        "(default: what the checkpoint says)",
    )
    parser.add_argument(
        "--int8", action="store_true",
        help="also UNets in 8 bits for OpenVINO (gd-infer --precision int8), by nncf, from runs of the model",
    )  # fmt: skip
    parser.add_argument(
        "--fp8", action="store_true",
        help="with --precision fp16: also UNets in FP8 for TensorRT, from runs of the model; --engine then builds "
        "those (checked on the CPU; not run on a GPU yet)",
    )  # fmt: skip
    parser.add_argument("--no-verify", action="store_true", help="skip the comparison with torch and diffusers")
    parser.add_argument("--overwrite", action="store_true", help="replace the bundle at --out")
    engine_cli.add_options(parser)
    args = parser.parse_args(argv)
    if args.head == "untrained" and (args.ckpt or args.bundle or not args.base):
        parser.error("--head untrained goes with --base MODEL, and with neither --ckpt nor --bundle")
    if args.statistics and (args.head or not args.ckpt):
        parser.error("--statistics is for the trained head of a --ckpt")
    if args.bundle and not (args.engine or args.int8 or args.fp8):
        parser.error("--bundle needs --engine, --int8 or --fp8: nothing else is added to an exported bundle")
    if args.int8 and args.precision != "fp32":
        parser.error("--int8 is made of a model in fp32; leave out --precision")
    if args.fp8 and not args.bundle and args.precision != "fp16":
        parser.error("--fp8 is made of a model in fp16; give --precision fp16")
    if args.fused and args.precision != "fp16":
        parser.error("--fused needs --precision fp16")
    if not (args.ckpt or args.base or args.bundle):
        parser.error("give --base MODEL, --ckpt CHECKPOINT, or --bundle BUNDLE")
    if args.bundle and (args.base or args.lora or args.vae):
        parser.error("--base, --lora and --vae are for exporting a model; a --bundle has its weights already")
    if args.bundle and (args.spacing or any(getattr(args, name) is not None for name in SAMPLING)):
        parser.error("how to sample is for exporting a model; a --bundle says it already, and gd-infer takes options")
    if not args.bundle and not args.out:
        parser.error(f"{'--ckpt' if args.ckpt else '--base'} needs --out, the bundle's directory")
    engine_cli.check(parser, args)
    return args


def model_options(parser: argparse.ArgumentParser) -> None:
    """What else a model is made of."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--family", choices=FAMILIES, metavar="NAME",
        help=f"what a single file is, where its tensors fit several: {', '.join(FAMILIES)}",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="PLACE",
        help="for a single file, which has none: a tokenizer's folder, or CLIP's bpe_simple_vocab_16e6.txt.gz "
        "(default: what this machine has)",
    )  # fmt: skip
    group.add_argument("--vae", metavar="PLACE", help="another autoencoder: a file, or a folder in diffusers' format")
    group.add_argument(
        "--lora", type=lora, action="append", default=[], metavar="FILE[:SCALE]",
        help="add a LoRA to the weights, SCALE times (default: 1); may be repeated",
    )  # fmt: skip


def sampling_options(parser: argparse.ArgumentParser) -> None:
    """What a bundle says that its runs are to take."""
    about = "what gd-infer takes from this bundle where its own options say nothing"
    group = parser.add_argument_group("sampling", about)
    add_sampling_options(group, "default: the model's own")
    group.add_argument(
        "--spacing", choices=["leading", "linspace", "trailing"],
        help="how steps are spread over the timesteps; few-step LoRAs want trailing (default: the model's own)",
    )  # fmt: skip


def with_sampling(checkpoint: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """The checkpoint, run as the options say."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    scheduler = checkpoint.scheduler
    if args.spacing:
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing=args.spacing)
    return replace(checkpoint, scheduler=scheduler, sampling=checkpoint.sampling | given)


def lora(text: str) -> tuple[str, float]:
    """ "file" or "file:0.8" -> (file, scale)."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if file and colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def quiet_libraries() -> None:
    """Keep the libraries' progress bars, advice and deprecations out of this command's output; errors still raise."""
    for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|torch|onnx|onnxscript|huggingface_hub)(\.|$)")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def export(args: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Load, export, verify."""
    from grounded_diffusion.export.staging import check_output

    check_output(args.out, args.overwrite)  # before the seconds that importing torch takes
    quiet_libraries()
    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.export.verify import verify_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint, untrained_checkpoint, with_statistics

    report("loading " + " on ".join(str(place) for place in (args.ckpt, args.base) if place))
    model = dict(family=args.family, tokenizer=args.tokenizer, vae=args.vae, loras=args.lora)
    if args.head == "untrained":
        checkpoint = untrained_checkpoint(args.base, args.capture_timestep, **model)
    else:
        checkpoint = load_checkpoint(args.ckpt, args.base, head=args.head, report=report, **model)
    checkpoint = with_sampling(checkpoint, args)
    if args.statistics:
        checkpoint = with_statistics(checkpoint, args.statistics)
    verify = None if args.no_verify else (lambda c, folder: verify_bundle(c, folder, report))
    export_bundle(
        checkpoint,
        args.out,
        precision=args.precision,
        fused=args.fused,
        verify=verify,
        overwrite=args.overwrite,
        report=report,
    )
    size = sum(file.stat().st_size for file in args.out.rglob("*"))
    report(f"wrote {args.out} ({size / 1e6:.0f} MB)")


def run(args: argparse.Namespace) -> None:
    """Export where there is a checkpoint, then build the engines asked for."""
    start = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:6.1f} s] {line}", flush=True)

    if args.int8:
        from grounded_diffusion.export.quantize import load_nncf, quantize_bundle

        load_nncf()  # before the minutes of an export
    if not args.bundle:
        export(args, report)
    if args.int8:
        quantize_bundle(args.bundle or args.out, report)
    if args.fp8:
        from grounded_diffusion.export.quantize import fp8_bundle

        fp8_bundle(args.bundle or args.out, report)
    if args.engine:
        engine_cli.build(args.bundle or args.out, args, report)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    kept = "interrupted; what was finished is kept"
    return run_command("gd-export", lambda: run(parse(argv)), {}, interrupted=kept, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
