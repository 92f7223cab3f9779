"""gd-bench: how fast the engine is, beside what one would use instead, and what faster settings cost in quality."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grounded_diffusion.bench.environment import environment, has_gpu
from grounded_diffusion.bench.report import (
    environment_line,
    quality_chart,
    speed_chart,
    speed_report,
    write_results,
)
from grounded_diffusion.bench.systems import PEERS, missing_packages
from grounded_diffusion.bench.work import EVERY_STEP, EngineForm, PeerForm, Plan
from grounded_diffusion.bundle import UNET, open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.calibrate import calibrate
from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND, backend_entry, cpu_backends
from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.engine.cli.common import Parser, run_command
from grounded_diffusion.engine.pipeline.shipped import shipped_bundle, shipped_checkpoint
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path
from grounded_diffusion.reading import Misfit, decode, read_file

DEFAULT_STEPS, DEFAULT_SAMPLER = 20, "dpmpp-2m"
GPU_BATCH = 16
MANY = 10**6
# Options that are at least 1, and the most of each.
COUNTS = dict(threads=1024, lanes=1024, batch=MANY, peer_batch=MANY, rounds=MANY, repeats=MANY, images=MANY)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = Parser(prog="gd-bench", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, parser_class=Parser)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", type=local_path, help="bundle (default: the shipped model, exported at first use)")
    common.add_argument(
        "--ckpt", type=local_path, help="the checkpoint it was exported from (default: the shipped one)"
    )
    common.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    common.add_argument("--batch", type=int, help="images to a call of the engine (default: by calibration)")
    common.add_argument("--lanes", type=int, help="calls of the engine at once (default: by calibration)")
    common.add_argument("--out", type=local_path, help="write JSON, Markdown and SVG into this folder")

    speed = kinds.add_parser("speed", parents=[common], help="stages, and systems end to end, taking turns")
    speed.add_argument(
        "--backend", choices=BACKENDS, action="append", metavar="NAME",
        help="of the engine, %(choices)s; repeatable (default: all of this CPU)",
    )  # fmt: skip
    known = f"of {', '.join(PEERS['cpu'])}, or on a GPU {', '.join(PEERS['cuda'])}"
    speed.add_argument("--peers", help=f"{known} (default: all of the device); '' for none")
    speed.add_argument("--sampler", default=DEFAULT_SAMPLER)
    speed.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    speed.add_argument("--guidance-scale", type=float, default=7.5)
    speed.add_argument(
        "--rounds", type=int, help="timed turns of every system (default: what fits into 90 seconds, at least 3)"
    )
    speed.add_argument("--repeats", type=int, default=9, help="timed calls of every stage (default 9)")
    speed.add_argument("--images", type=int, default=32, help="images to a turn, at least (default 32)")
    speed.add_argument("--peer-batch", type=int, help="images to a call of a peer (default: eager's fastest)")
    speed.add_argument("--no-memory", action="store_true", help="skip the measurement of peak memory")

    quality = kinds.add_parser("quality", parents=[common], help="price and quality of settings, judged by a segmenter")
    about = "a segmentation model of transformers that knows the names (default: the checkpoint's judge/)"
    quality.add_argument("--judge", metavar="MODEL", help=about)
    about = "fields of Options, name, system, capture; repeatable; the first is what the others are compared with"
    quality.add_argument("--setting", action="append", default=[], metavar="'key=value ...'", help=about)
    quality.add_argument("--settings", type=local_path, help="JSON file with a list of such settings as objects")
    quality.add_argument("--images", type=int, default=336, help="images of every setting (default 336)")
    quality.add_argument("--objects", type=int, choices=(1, 2), default=1, help="objects to a prompt (default 1)")

    grounding = kinds.add_parser("grounding", help="what grounding adds, with random weights")
    grounding.add_argument("--size", default="sd15", help="sd15 or tiny (default sd15)")
    grounding.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    grounding.add_argument("--threads", type=int, default=usable_cores(), help="CPU threads (default: all cores)")
    grounding.add_argument("--out", type=local_path, help="write JSON and Markdown into this folder")

    gpu = kinds.add_parser("gpu-model", help="what GPUs would take, by counted operations and bytes; nothing is run")
    gpu.add_argument("--model", type=local_path, required=True, help="bundle of --precision fp16, best with --fused")
    gpu.add_argument("--batch", type=int, action="append", help="images to a call; repeatable (default 1 and 16)")
    gpu.add_argument("--out", type=local_path, help="write JSON and Markdown into this folder")
    args = parser.parse_args(argv)
    for name, most in COUNTS.items():
        if (given := getattr(args, name, None)) is not None and isinstance(given, int) and not 1 <= given <= most:
            parser.error(f"--{name.replace('_', '-')} must be a whole number from 1 to {most}, not {given}")
    return args


def model_of(args: argparse.Namespace, student: bool = False) -> Path:
    """The bundle given, or the shipped one, with UNets in 8 bits where they can be made here."""
    return args.model or shipped_bundle(say, student, int8=importlib.util.find_spec("nncf") is not None)


def open_model(
    args: argparse.Namespace, options: Options, backend: str = DEFAULT_BACKEND
) -> tuple[GroundedPipeline, int]:
    """The engine with the batch and lanes that are best on this machine, or were asked for; and images to a call."""
    model, chosen = model_of(args), dict(backend=backend, threads=args.threads)
    if backend_entry(backend).device != "cpu":
        return GroundedPipeline.open(model, **chosen), args.batch or GPU_BATCH
    batch, lanes = args.batch, args.lanes
    if not (batch and lanes):
        found = calibrate(open_bundle(model), options, args.threads, say, backend)
        batch, lanes = batch or found.batch, lanes or found.lanes
    return GroundedPipeline.open(model, **chosen, lanes=lanes), batch


def backends_here(args: argparse.Namespace) -> list[str]:
    """The backends in all precisions that the bundle has and this machine's CPU computes in.

    First the fastest of those that need no asking for, last the exact one.
    """
    exact, *others = cpu_backends()
    int8 = cpu_backends("int8") if open_bundle(model_of(args)).int8(UNET) else []
    return [*reversed(others), *int8, exact]


def last_of_each(backends: Sequence[str]) -> dict[str | None, str]:
    """The last backend in each precision; None is the bundle's own."""
    return {backend_entry(name).precision: name for name in backends}


def open_engines(
    args: argparse.Namespace, options: Options
) -> tuple[dict[str, GroundedPipeline], dict[str, EngineForm]]:
    """The engine by every backend asked for: "fp32" is the last in that precision, others "fp32 by" their backend."""
    pipes, forms, backends = {}, {}, args.backend or backends_here(args)
    last = last_of_each(backends).values()
    for backend in backends:
        pipe, batch = open_model(args, options, backend)
        precision = backend_entry(backend).precision or pipe.bundle.manifest.precision
        label = precision if backend in last else f"{precision} by {backend}"
        pipes[label], forms[label] = pipe, EngineForm(backend, batch, pipe.backend.lanes)
    return pipes, forms


def open_student(args: argparse.Namespace, form: EngineForm) -> GroundedPipeline:
    """The shipped model's student in the form that is best for the model itself."""
    return GroundedPipeline.open(
        model_of(args, student=True), backend=form.backend, threads=args.threads, lanes=form.lanes
    )


def checkpoint_of(args: argparse.Namespace) -> Path | None:
    """The checkpoint the peers load: the shipped one goes with the shipped bundle only."""
    return args.ckpt or (None if args.model else shipped_checkpoint())


def emit(args: argparse.Namespace, stem: str, record: Any, lines: list[str], chart: str = "") -> None:
    """Print the table; write the files where asked."""
    print("\n".join(lines))
    if args.out:
        write_results(args.out, stem, record, lines, chart)
        say(f"wrote {args.out}/{stem}.json, .md" + (", .svg" if chart else ""))


def run_speed(args: argparse.Namespace) -> None:
    """gd-bench speed."""
    from grounded_diffusion.bench.speed import measure_speed

    devices = {backend_entry(name).device for name in args.backend or [DEFAULT_BACKEND]}
    device = devices.pop()
    if devices:
        raise UsageError("backends of a CPU and of a GPU are not measured together; give --backend for one device")
    if device == "cuda" and not has_gpu():
        print("skipped: no NVIDIA GPU")
        return
    peers = PEERS[device] if args.peers is None else tuple(peer for peer in args.peers.split(",") if peer)
    if unknown := [peer for peer in peers if peer not in PEERS[device]]:
        raise UsageError(f"there is no peer {unknown[0]!r}; choose from {', '.join(PEERS[device])}")
    options = Options(
        sampler=args.sampler, steps=args.steps, guidance_scale=args.guidance_scale, guidance_interval=EVERY_STEP,
        batch=args.batch,
    )  # fmt: skip
    pipes, engines = open_engines(args, options)
    pipe, checkpoint = next(iter(pipes.values())), checkpoint_of(args)
    usual = max(form.batch for form in engines.values())
    forms = {peer.split()[1]: PeerForm(args.peer_batch or usual) for peer in peers}
    if not args.peer_batch and peers and checkpoint and not missing_packages("eager"):
        from grounded_diffusion.bench.peers import fastest_form

        tries = sorted({max(1, usual // 2), usual, 2 * usual})
        shape = pipe.latent_shape(options)
        forms = {name: fastest_form(checkpoint, shape, name, tries, device, args.threads) for name in forms}
    together = math.lcm(*(form.batch * form.lanes for form in engines.values()))
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            options=options, threads=args.threads, engines=engines, peers=peers, peer_forms=forms,
            images=-(-args.images // together) * together, least=args.images, rounds=args.rounds, repeats=args.repeats,
            checkpoint=checkpoint, folder=Path(folder), memory=not args.no_memory,
        )  # fmt: skip
        result = measure_speed(pipes, plan, say)
    for pipe in pipes.values():
        pipe.close()
    stem = "speed-cpu" if device == "cpu" else f"speed-{args.backend[0]}"
    emit(args, stem, result, speed_report(result), speed_chart(result))


def run_quality(args: argparse.Namespace) -> None:
    """gd-bench quality."""
    import torch

    from grounded_diffusion.bench.quality import DEFAULT, make_setting, measure_quality, parse_setting, quality_table
    from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter

    torch.set_num_threads(args.threads)
    settings = [parse_setting(text) for text in args.setting]
    if args.settings:
        settings += read_settings(args.settings)
    checkpoint = checkpoint_of(args)
    if checkpoint is None:
        raise UsageError("--model needs --ckpt, the checkpoint it was exported from")
    judge = TransformersSegmenter(args.judge or checkpoint / "judge")
    for setting in settings:  # refused before anything is measured
        make_setting(setting, 1)
    asked = [(setting.get("model", "given"), setting.get("precision", "fp32")) for setting in settings or DEFAULT]
    wanted = {precision for _, precision in asked}
    args.backend = [name for precision, name in last_of_each(backends_here(args)).items() if precision in wanted]
    engines, forms = open_engines(args, Options(batch=args.batch))
    pipes = {("given", precision): pipe for precision, pipe in engines.items()}
    if not args.model:
        pipes |= {
            (model, precision): open_student(args, forms[precision])
            for model, precision in dict.fromkeys(asked)
            if model == "student" and precision in forms
        }
    settings = settings or [setting for setting, key in zip(DEFAULT, asked, strict=True) if key in pipes]
    turn = math.lcm(*(form.batch * form.lanes for form in forms.values()))
    results = measure_quality(
        pipes, checkpoint, judge, settings, images=args.images,
        batch=max(form.batch for form in forms.values()), turn=turn, objects=args.objects, report=say,
    )  # fmt: skip
    pipe = next(iter(pipes.values()))
    about = environment(pipe.bundle, args.threads)
    lines = quality_table(results)
    lines += ["", f"{args.images} images each. Measured on {environment_line(about)}."]
    stem = "quality" if args.objects == 1 else "quality-pairs"
    emit(args, stem, {"environment": about, "settings": results}, lines, quality_chart(results))


def read_settings(file: Path) -> list[dict[str, Any]]:
    """Settings of a JSON file. Raises UsageError."""
    try:
        return decode(read_file(file), list[dict[str, Any]])
    except OSError as error:
        raise UsageError(f"cannot read the settings {file}: {error.strerror}") from None
    except Misfit as error:
        raise UsageError(f"{error.at(file)}; it must hold a list of tables, one a setting") from None


def run_grounding(args: argparse.Namespace) -> None:
    """gd-bench grounding."""
    import torch

    from grounded_diffusion.bench.grounding import grounding_table, measure_grounding

    torch.set_num_threads(args.threads)
    result = measure_grounding(args.size, args.rounds, say)
    result["environment"] = environment(None, args.threads)
    lines = [*grounding_table(result), "", f"Measured on {environment_line(result['environment'])}."]
    emit(args, f"grounding-{args.size}", result, lines)


def run_gpu_model(args: argparse.Namespace) -> None:
    """gd-bench gpu-model."""
    from grounded_diffusion.bench.gpu.model import model_gpus, model_table

    result = model_gpus(open_bundle(args.model, verify=False), tuple(args.batch or (1, GPU_BATCH)))
    emit(
        args, "gpu-model", result, [*model_table(result), "", "A model of counted operations and bytes, not measured."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of gd-bench: 0, or 1 and 2 as GroundedDiffusionError has them."""
    runs = {"speed": run_speed, "quality": run_quality, "grounding": run_grounding, "gpu-model": run_gpu_model}

    def body() -> None:
        args = parse(argv)
        if args.kind == "quality" and (missing := missing_packages("eager")):
            raise UsageError(f"gd-bench quality needs {', '.join(missing)}: pip install 'grounded-diffusion[export]'")
        if not missing_packages("eager"):
            from grounded_diffusion.export.cli import quiet_libraries

            quiet_libraries()
        warnings.filterwarnings("ignore", module="torch|diffusers|transformers|onnxscript")
        runs[args.kind](args)

    return run_command("gd-bench", body, {}, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
