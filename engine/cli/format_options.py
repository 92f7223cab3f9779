"""The options of a format, which gd-infer and gd-dataset convert share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from grounded_diffusion.engine.dataset.formats import WITHOUT_CLASSES, default_quality
from grounded_diffusion.engine.dataset.formats.common import Classes, Settings
from grounded_diffusion.engine.prompts.vocabulary import BUILT_IN, COCO_IDS, built_in, read_names


def add_format_options(parser: argparse.ArgumentParser, *, band: bool) -> None:
    """The options of `Settings`. `band`: whether probabilities are at hand, as they are while samples are made."""
    group = parser.add_argument_group("format")
    group.add_argument(
        "--names", metavar="NAMES",
        help="class names and ids: a file with a name a line, ids by order; or voc, coco (ids up to 90 as COCO has "
        "them), emoji-64 (default: sorted names)",
    )  # fmt: skip
    image = group.add_mutually_exclusive_group()
    image.add_argument(
        "--jpeg-quality", type=int, metavar="N", help="write images as JPEG, 1 to 100 (default: 95; for folder PNG)"
    )
    image.add_argument("--png", action="store_true", help="write images as PNG, without loss")
    group.add_argument(
        "--void-border", type=int, default=0, metavar="PX", help="mark this many pixels on either side of edges as 255"
    )
    if band:
        group.add_argument(
            "--void-band", type=float, nargs=2, metavar=("LOW", "HIGH"),
            help="mark pixels as 255 at which an object's probability lies between these, as in 0.3 0.7",
        )  # fmt: skip
    group.add_argument("--polygons", action="store_true", help="coco: polygons instead of run lengths")


def settings_of(args: argparse.Namespace, format: str, found: Iterable[str]) -> Settings:
    """The settings that a command line asks for. `found` are the names of the objects. Raises UsageError."""
    quality = default_quality(format) if args.jpeg_quality is None else args.jpeg_quality
    band = getattr(args, "void_band", None)
    return Settings(
        classes=Classes(()) if format in WITHOUT_CLASSES else choose_classes(args.names, found),
        jpeg_quality=None if args.png else quality,
        void_border=args.void_border,
        void_band=tuple(band) if band else None,
        polygons=args.polygons,
    )


def choose_classes(names: str | None, found: Iterable[str]) -> Classes:
    """The classes of `--names`; without it, the sorted names that were found. Raises UsageError."""
    if names is None:
        return Classes(tuple(sorted(set(found))))
    if names in BUILT_IN:
        return Classes(built_in(names).names, COCO_IDS if names == "coco" else ())
    return Classes(read_names(names))
