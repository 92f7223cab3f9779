"""Build TensorRT engines into a bundle: `python -m grounded_diffusion.export.engine_cli bundle --sm 86,89`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from grounded_diffusion.bundle import GRAPHS, open_bundle
from grounded_diffusion.errors import GroundedDiffusionError
from grounded_diffusion.export.engines import Bucket, build_engines

MODULE = "python -m grounded_diffusion.export.engine_cli"


def whole_numbers(text: str) -> list[int]:
    """Positive numbers separated by commas, each once."""
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"write positive whole numbers with commas, such as 1,8, not {text!r}")
    return numbers


def image_size(text: str) -> tuple[int, int]:
    """HxW."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"write height and width as 512x512, not {text!r}")
    return int(parts[0]), int(parts[1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(MODULE, description=__doc__.split(":")[0] + ".")
    parser.add_argument("bundle", type=Path, help="a bundle made by gd-export; engines go into its engines/ folder")
    parser.add_argument(
        "--engine", choices=["tensorrt", "tensorrt-rtx"], default="tensorrt-rtx",
        help="tensorrt-rtx (default) builds without a GPU; tensorrt for the GPU at hand",
    )  # fmt: skip
    parser.add_argument("--sm", type=whole_numbers, help="architectures to build for, such as 86,89,120 (tensorrt-rtx)")
    parser.add_argument("--batch", type=whole_numbers, default=[1], help="images per call, such as 1,8,16 (default: 1)")
    parser.add_argument("--objects", type=int, default=8, help="objects per image; fewer are padded (default: 8)")
    parser.add_argument("--size", type=image_size, help="image size as HxW (default: the bundle's)")
    parser.add_argument("--graph", choices=GRAPHS, action="append", help="build only this graph; may be repeated")
    options = parser.parse_args(argv)
    if options.engine == "tensorrt-rtx" and not options.sm:
        parser.error("--engine tensorrt-rtx needs --sm, such as --sm 86,89,120")
    return options


def run(options: argparse.Namespace, console: Console) -> None:
    """Build what is missing, with the builder's phase on a terminal and plain lines elsewhere."""
    bundle = open_bundle(options.bundle)
    buckets = [Bucket(batch, options.objects, options.size) for batch in options.batch]
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("", total=None)
        build_engines(
            bundle,
            options.engine.replace("-", "_"),
            sms=options.sm or [None],
            buckets=buckets,
            graphs=options.graph or GRAPHS,
            progress=lambda phase, done, steps: display.update(task, description=phase, completed=done, total=steps),
            report=lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(argv)
    try:
        run(options, Console())
    except GroundedDiffusionError as error:
        print(f"engine_cli: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("engine_cli: interrupted; engines already built are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
