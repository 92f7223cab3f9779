"""gd-dataset: watch, look at, convert, check, count, split and merge what gd-infer wrote.

Exit status: 0 done, 1 verify has found problems, 2 an option or a folder cannot be used.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from itertools import islice
from pathlib import Path
from typing import cast

from grounded_diffusion.engine.cli import common
from grounded_diffusion.engine.cli.completion import add_completion_option
from grounded_diffusion.engine.cli.options import add_format_options, format_options_of
from grounded_diffusion.engine.dataset.card import CARD, write_card
from grounded_diffusion.engine.dataset.formats import FORMATS, WITHOUT_CLASSES, open_format
from grounded_diffusion.engine.dataset.formats.options import sorted_classes
from grounded_diffusion.engine.dataset.ours import folder_files
from grounded_diffusion.engine.dataset.preview import PAGE, write_preview
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.runfile import CONVERT
from grounded_diffusion.engine.dataset.shards import Recording, finished_shards, note_files, read_shard, write_dataset
from grounded_diffusion.engine.dataset.status import describe_status, read_status
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.dataset.tools.merge import merge
from grounded_diffusion.engine.dataset.tools.plot import plot
from grounded_diffusion.engine.dataset.tools.split import split
from grounded_diffusion.engine.dataset.tools.statistics import statistics
from grounded_diffusion.engine.dataset.verify import verify
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import check_target, fresh_folder, local_path, readable_errors, replace_file

note = functools.partial(common.note, "gd-dataset")
SHOWN = 20  # problems that verify lists
WHERE = "the --out of gd-infer, a folder or a URL"

EXAMPLES = """\
examples:
  gd-dataset status out/
  gd-dataset verify out/
  gd-dataset split out/ --val 0.1
  gd-dataset convert out/ --format coco --out coco/
  gd-dataset convert out/ --format voc --names voc --void-border 2 --out voc/
  gd-dataset merge out1/ out2/ --out both/

exit status: 0 done; 1 verify has found problems; 2 an option or a folder cannot be used
"""


def build_parser() -> common.Parser:
    parser = common.Parser(
        prog="gd-dataset",
        description="Work with the data sets that gd-infer writes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion_option(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=common.Parser)
    add_convert(commands)

    command = commands.add_parser("verify", help="check every file against its record")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.set_defaults(run=run_verify)

    command = commands.add_parser("stats", help="counts and areas of the classes, and their overlaps")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--plot", type=local_path, metavar="FILE.svg", help="draw counts, histograms and overlaps")
    command.set_defaults(run=run_stats)

    command = commands.add_parser("status", help="how far a run is, whether it goes on, has died or is finished")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(run=run_status)

    command = commands.add_parser("preview", help=f"make {PAGE} anew, a page to look at the data set")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.set_defaults(run=run_preview)

    command = commands.add_parser("card", help=f"write {CARD}, a data set card with recipe, classes and pictures")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.add_argument("--title", metavar="TEXT", help="default: the folder's name")
    command.add_argument("--license", metavar="ID", help="as the Hugging Face hub spells it, such as cc-by-4.0")
    command.add_argument("--model", type=local_path, metavar="BUNDLE", help="the model, for the licence notes")
    command.add_argument("--overwrite", action="store_true", help=f"replace a {CARD} that is not ours")
    command.set_defaults(run=run_card)

    command = commands.add_parser("split", help="write train.txt and val.txt; convert follows them")
    command.add_argument("dir", metavar="DIR", help=WHERE)
    command.add_argument("--val", type=float, required=True, metavar="SHARE", help="share of val, as in 0.1")
    command.set_defaults(run=run_split)

    command = commands.add_parser("merge", help="join data sets, numbering the samples anew")
    command.add_argument("dirs", nargs="+", metavar="DIR", help=WHERE)
    add_out(command)
    command.set_defaults(run=run_merge)
    return parser


def add_out(command: argparse.ArgumentParser) -> None:
    """Options of what a command writes."""
    command.add_argument("--out", type=local_path, required=True, metavar="DIR", help="new folder on this machine")
    command.add_argument("--overwrite", action="store_true", help="replace what this command wrote there before")


def add_convert(commands) -> None:
    command = commands.add_parser("convert", help="write the data set in another format")
    command.add_argument("dir", metavar="SRC", help=WHERE)
    formats = [name for name in FORMATS if name not in WITHOUT_CLASSES]
    command.add_argument("--format", required=True, choices=formats, help="what to write: %(choices)s", metavar="NAME")
    add_out(command)
    command.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="samples in a tar or Parquet file (default: 1000)"
    )
    add_format_options(command, band=False)
    command.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    if not 1 <= args.shard_size <= 1_000_000:
        raise UsageError(f"--shard-size must be from 1 to 1000000, not {args.shard_size}")
    data = FolderDataset(args.dir)
    check_apart(args.out, [args.dir])
    options = format_options_of(args)
    settings = options.settings(args.format, options.classes(args.format) or sorted_classes(data.names))
    format = open_format(args.format, settings)
    for row in data.rows():
        names = [thing["name"] for thing in row["objects"]]
        settings.classes.check(names, f"the record {row['id']} of {args.dir}")
    with fresh_folder(args.out, args.overwrite, functools.partial(folder_files, command=CONVERT)) as folder:
        losses = write_dataset(LocalStorage(folder), format, data.parts(), format.encode, args.shard_size)
    if losses:
        note(losses)
    print(f"{len(data)} images with {len(settings.classes.names)} classes as {args.format} in {args.out}")
    return 0


def check_apart(out: Path, sources: list[str]) -> None:
    """Raise UsageError where writing `out` would touch a source."""
    for source in map(Path, sources):
        if out.resolve().is_relative_to(source.resolve()) or source.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"--out {out} and {source} lie within each other; choose another --out")


def run_verify(args: argparse.Namespace) -> int:
    if "://" not in args.dir and not Path(args.dir).is_dir():
        raise UsageError(f"there is no folder {args.dir}")
    problems = verify(args.dir)
    shown = list(islice(problems, SHOWN))
    for problem in shown:
        print(problem)
    if rest := sum(1 for _ in problems):
        print(f"and {rest} more")
    if not shown:
        print(f"{args.dir}: {count_samples(args.dir)} records, no problems")
    return int(bool(shown))


def count_samples(path: str) -> int:
    """Accepted samples of all shards."""
    storage = open_storage(path)
    return sum(read_shard(storage, shard)["accepted"] for shard in finished_shards(storage))


def run_stats(args: argparse.Namespace) -> int:
    if args.plot:
        check_target(args.plot, "plot", (".svg",), b"<svg ")
    result = statistics(FolderDataset(args.dir))
    if args.plot:
        with readable_errors(args.plot):
            replace_file(args.plot, plot(result).encode())
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    print(f"{result['images']} images, {result['objects']} objects\n")
    percent = lambda value: f"{100 * value:.1f}%"
    rows = [
        [
            name,
            c["images"],
            c["empty"],
            *(percent(c[f"{k}_area"]) for k in ("min", "mean", "max")),
            f"{c['mean_score']:.3f}",
        ]
        for name, c in result["classes"].items()
    ]
    print(table(["class", "images", "empty", "min area", "mean", "max", "score"], rows))
    if result["overlaps"]:
        rows = [
            [" + ".join(o["classes"]), o["images"], o["overlapping"], f"{o['mean_iou']:.3f}"]
            for o in result["overlaps"]
        ]
        print("\n" + table(["pair", "images", "overlapping", "mean IoU"], rows))
    return 0


def table(head: list[str], rows: list[list]) -> str:
    """Columns as wide as their widest entry, the first to the left, the others to the right."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def run_status(args: argparse.Namespace) -> int:
    status = read_status(args.dir)
    print(json.dumps(status, indent=1, ensure_ascii=False) if args.json else describe_status(status))
    return 0


def run_preview(args: argparse.Namespace) -> int:
    data = FolderDataset(args.dir, splits=False)
    recording = Recording(data.storage)
    images = write_preview(cast(Storage, recording), data.rows(), data.settings)
    note_files(recording)
    data.storage.clean()
    print(f"{images} images in {data.storage.root}/{PAGE}")
    return 0


def run_card(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name) for name in ("title", "license", "model", "overwrite")}
    contents = write_card(args.dir, **options)
    print(f"{contents.images} images with {len(contents.classes)} classes described in {args.dir}/{CARD}")
    if not args.license:
        note("the card names no licence; --license ID adds it")
    return 0


def run_split(args: argparse.Namespace) -> int:
    counts = split(FolderDataset(args.dir, splits=False), args.val)
    print(f"{counts['train']} images in train.txt, {counts['val']} in val.txt")
    return 0


def run_merge(args: argparse.Namespace) -> int:
    if len(args.dirs) < 2:
        raise UsageError("merge needs two or more data sets")
    check_apart(args.out, args.dirs)
    print(f"{merge(args.dirs, args.out, args.overwrite)} images in {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""

    def body() -> int:
        args = build_parser().parse_args(argv)
        return args.run(args)

    return common.run_command("gd-dataset", body, {}, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
