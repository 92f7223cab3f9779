"""gd-train: a grounding head on any model, a student of few steps, and a model of our own from scratch."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from grounded_diffusion.engine.checks import check_int
from grounded_diffusion.engine.cli.common import Parser, run_command
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path
from grounded_diffusion.training.grounding import cli as any_model

if TYPE_CHECKING:  # it loads torch
    from grounded_diffusion.training.scratch.config import TrainConfig

STAGES = {
    "base": "autoencoder, then UNet and text encoder",
    "labeller": "a segmenter, for gd-train examples --detector",
    "judge": "another, for gd-eval --detector",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, which has a `command` where it is on any model."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in any_model.COMMANDS:
        return any_model.parse(argv)
    listing = "\n".join(f"  {name:9} {text}" for name, text in STAGES.items())
    parser = Parser(
        prog="gd-train",
        description=(
            "Train a grounding head on any Stable Diffusion model (gd-train examples --help shows all of it):\n"
            "  examples  images from the model, masks from a detector\n"
            "  real      the same from real images with masks\n"
            "  head      the head, into a checkpoint that gd-export takes\n"
            "  distill   a student that draws in a few unguided steps\n"
            f"or the model itself, as the shipped one was, on rendered scenes. Stages, in this order:\n{listing}"
        ),
        epilog="A command that was stopped goes on where it was when it is given again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="one of " + ", ".join(STAGES))
    parser.add_argument("--config", required=True, type=local_path, help="TOML file, such as models/things-64.toml")
    parser.add_argument("--run", required=True, type=local_path, help="folder of the run: states, samples, weights")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch

    from grounded_diffusion.training.devices import check_device
    from grounded_diffusion.training.scratch.config import load_config
    from grounded_diffusion.training.things.world import World

    check_int(args.threads, "threads", 0, 1024)
    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_config(args.config)
    check_stages(config, args.stage)
    args.run.mkdir(parents=True, exist_ok=True)
    world = World(config.world, list(config.names), args.device)
    if args.stage == "base":
        from grounded_diffusion.training.scratch.unet import train_base
        from grounded_diffusion.training.scratch.vae import train_vae

        train_vae(config, world, args.run)
        train_base(config, world, args.run)
    else:
        from grounded_diffusion.training.scratch.segmenters import train_segmenter

        train_segmenter(args.stage, config, args.config, world, args.run, lambda line: print(line, flush=True))


def check_stages(config: TrainConfig, stage: str) -> None:
    """Raise UsageError where the configuration has no pace for what a stage trains."""
    needed = ("vae", "unet") if stage == "base" else (stage,)
    given = config.init.keys() & {"vae"}
    if missing := [name for name in needed if name not in config.stages and name not in given]:
        raise UsageError(f"the configuration has no table [stages.{missing[0]}], which gd-train {stage} needs")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""

    def body() -> None:
        args = parse(argv)
        any_model.run(args) if "command" in args else run(args)

    kept = "interrupted; the same command goes on from the last saved step"
    return run_command("gd-train", body, {}, interrupted=kept, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
