"""Groups of options, some of which commands share: sampling, a format, the filters, the monitor."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from grounded_diffusion.engine.dataset.formats import FormatOptions
from grounded_diffusion.engine.dataset.formats.options import INSTANCES, LEAST_PART
from grounded_diffusion.engine.runs.filters import Filters
from grounded_diffusion.engine.sampling.schedule import SAMPLERS
from grounded_diffusion.files import local_path


def add_sampling_options(group: argparse._ArgumentGroup, otherwise: str) -> None:
    """How images are drawn; `otherwise` tells what is taken where an option is not given."""
    group.add_argument("--sampler", choices=SAMPLERS, metavar="NAME", help=f"%(choices)s ({otherwise})")
    group.add_argument("--steps", type=int, metavar="N", help=f"denoising steps ({otherwise})")
    group.add_argument(
        "--guidance-scale", type=float, metavar="W",
        help=f"how strongly the prompt is followed; 1 turns guidance off ({otherwise})",
    )  # fmt: skip
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("START", "END"),
        help=f"guide only in this part of the way from noise (0) to image (1) ({otherwise})",
    )  # fmt: skip


def add_format_options(parser: argparse.ArgumentParser, *, band: bool) -> None:
    """The options of `FormatOptions`. `band`: whether probabilities are at hand, as they are while samples are made."""
    group = parser.add_argument_group("format")
    group.add_argument(
        "--names", metavar="NAMES",
        help="class names and ids: a file with a name a line, ids by order; or voc, coco (ids up to 90 as COCO has "
        "them), things-64 (default: sorted names)",
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
    group.add_argument(
        "--instances", choices=INSTANCES, default=INSTANCES[0],
        help="coco, coco-panoptic, yolo: one object a class, or one for each connected part of its mask "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--instance-area", type=float, metavar="P",
        help=f"components: least share of the image that a part covers (default: {LEAST_PART:g})",
    )  # fmt: skip
    group.add_argument("--polygons", action="store_true", help="coco: polygons instead of run lengths")


def format_options_of(args: argparse.Namespace) -> FormatOptions:
    """What a command line asks of the format. Raises UsageError."""
    given: dict[str, Any] = {field.name: getattr(args, field.name, None) for field in fields(FormatOptions)}
    return FormatOptions(**given)


def add_filter_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Filters`, as a group."""
    group = parser.add_argument_group("filters", "a rejected sample is tried again with other noise; see --attempts")
    group.add_argument("--require-masks", action="store_true", help="reject a sample in which an object has no mask")
    group.add_argument("--min-area", type=float, metavar="P", help="least share of the image that each mask covers")
    group.add_argument("--max-area", type=float, metavar="P", help="largest share of the image that a mask covers")
    group.add_argument("--min-score", type=float, metavar="P", help="least mean probability inside each mask")
    group.add_argument(
        "--min-presence", type=float, metavar="P", help="least probability that each object is there (try 0.5)"
    )
    group.add_argument(
        "--max-overlap", type=float, metavar="P",
        help="largest share of the smaller of two masks that the other may cover",
    )  # fmt: skip
    group.add_argument(
        "--min-distance", type=int, metavar="BITS",
        help="reject near-duplicates: images of a shard whose 64-bit difference hashes differ in fewer bits (try 4)",
    )  # fmt: skip


def filters_of(args: argparse.Namespace) -> Filters:
    """The filters that a command line asks for. Raises UsageError."""
    return Filters(**{field.name: getattr(args, field.name) for field in fields(Filters)})


def add_monitor_options(parser: argparse.ArgumentParser) -> None:
    """What is seen of a run from outside, as a group."""
    group = parser.add_argument_group("seen from outside")
    group.add_argument("--log", type=local_path, metavar="FILE", help="append a structured log, one JSON object a line")
    group.add_argument(
        "--metrics-file", type=local_path, metavar="FILE",
        help="keep a Prometheus text file there, as node_exporter's textfile collector reads it (*.prom)",
    )  # fmt: skip
    group.add_argument(
        "--metrics-port", metavar="[HOST:]PORT", help="serve /metrics for Prometheus there (host: 127.0.0.1)"
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What the command says of itself, as a group."""
    group = parser.add_argument_group("what is said")
    group.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
    group.add_argument("--json", action="store_true", help="print what came of it as JSON, on standard output")
