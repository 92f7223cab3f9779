"""The options of gd-export that build TensorRT engines into a bundle, and the display of a build."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from grounded_diffusion.bundle import FP8, GPU, GPU_GRAPHS, open_bundle
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, load_module, target
from grounded_diffusion.engine.backends.tensorrt.store import OBJECTS
from grounded_diffusion.engine.cli.common import parse_size

FIRST_FP8 = 89  # the first architecture whose tensor cores take FP8


def whole_numbers(text: str) -> list[int]:
    """Positive numbers separated by commas, each once."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"write positive whole numbers with commas, such as 1,8, not {text!r}")
    return numbers


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a build."""
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--engine", choices=["tensorrt", "tensorrt-rtx"],
        help="also build engines into the bundle: tensorrt for the GPU at hand, tensorrt-rtx without one",
    )  # fmt: skip
    group.add_argument("--sm", type=whole_numbers, help="architectures to build for, such as 86,89,120 (tensorrt-rtx)")
    group.add_argument("--batch", type=whole_numbers, default=[1], help="images per call, such as 1,8,16 (default: 1)")
    group.add_argument(
        "--objects", type=int, default=OBJECTS, help="objects per image; fewer are padded (default: %(default)s)"
    )
    group.add_argument("--size", type=parse_size, help="image size, 512 or HEIGHTxWIDTH (default: the bundle's)")
    group.add_argument(
        "--guided-only", action="store_true", help="leave out the UNet without guidance, for the steps that have none"
    )
    group.add_argument("--graph", choices=GPU_GRAPHS, action="append", help="build only this graph; may be repeated")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be built, before anything long is begun.

    Raises:
        UsageError: options that do not fit together.
        BackendError: a backend that is not installed, or a device it does not build for.
    """
    if not options.engine:
        given = [name for name in ("sm", "size", "graph", "guided_only") if getattr(options, name)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} needs --engine tensorrt or --engine tensorrt-rtx")
        return
    if options.engine == "tensorrt-rtx" and not options.sm:
        parser.error("--engine tensorrt-rtx needs --sm, such as --sm 86,89,120")
    if options.fp8 and min(options.sm or [FIRST_FP8]) < FIRST_FP8:
        parser.error(f"--fp8 needs --sm {FIRST_FP8} or above: older GPUs have no FP8")
    backend = options.engine.replace("-", "_")
    for sm in options.sm or [None]:
        target(load_module(backend), backend, sm)


def build(bundle: Path, options: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Build what the bundle lacks, with the builder's phase on a terminal and plain lines elsewhere."""
    from grounded_diffusion.export.engines import build_engines

    buckets = [
        Bucket(batch, options.objects, options.size, guided)
        for batch in options.batch
        for guided in ([True] if options.guided_only else [True, False])
    ]
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("", total=None)
        build_engines(
            open_bundle(bundle),
            options.engine.replace("-", "_"),
            sms=options.sm or [None],
            buckets=buckets,
            graphs=options.graph or GPU_GRAPHS,
            variant=FP8 if options.fp8 else GPU,
            progress=lambda phase, done, steps: display.update(task, description=phase, completed=done, total=steps),
            report=report,
        )
