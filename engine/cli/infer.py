"""gd-infer: prompts in, images with masks out.

Exit status: 0 complete; 3 complete, but for samples that were rejected or failed; 75 interrupted or out of disk space,
and the same command goes on; 2 an option, prompt, model or output cannot be used; 1 any other failure.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from dataclasses import asdict, fields
from typing import TextIO

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND, PRECISIONS
from grounded_diffusion.engine.cli import common
from grounded_diffusion.engine.cli.common import parse_seed, parse_size
from grounded_diffusion.engine.cli.completion import add_completion_option
from grounded_diffusion.engine.cli.config_file import add_config_option, parse_with_config
from grounded_diffusion.engine.cli.options import (
    add_filter_options,
    add_format_options,
    add_monitor_options,
    add_output_options,
    add_sampling_options,
    filters_of,
    format_options_of,
)
from grounded_diffusion.engine.dataset.formats import FORMATS
from grounded_diffusion.engine.dataset.shards import finished_shards
from grounded_diffusion.engine.runs.config import ATTEMPTS, RunConfig
from grounded_diffusion.engine.runs.estimate import estimate
from grounded_diffusion.engine.runs.make import DatasetResult, carry_out
from grounded_diffusion.engine.runs.monitor import Monitor, open_monitor
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path

# Options that are not called as the field of RunConfig that they set.
FLAGS = {"prompt_file": "--prompts FILE", "prompts": "--prompt TEXT"}
RANDOM = "random"  # as a seed
LOST = 3  # exit status of a run that is complete without some of its samples

EXAMPLES = """\
prompt files:
  One prompt a line, the objects to mask in brackets:   a photograph of a [dog] and a [cat]
  Or a JSON line: {"prompt": "a busy street", "objects": ["car", "bus"], "seed": 3, "count": 4}
  Empty lines and lines that start with # are skipped.

examples:
  gd-infer --prompts prompts.txt --out out/
  gd-infer --prompt "a photograph of a [giraffe]" --images-per-prompt 16 --out out/ --sampler dpmpp-2m --steps 20
  gd-infer --prompts prompts.txt --out s3://bucket/train --format webdataset --require-masks --shard 3/8

The same command given again makes what is missing. Several at once share the work, shard by shard.

exit status: 0 complete; 3 complete, but for samples that were rejected or failed; 75 interrupted or out of disk
space, and the same command goes on; 2 an option, prompt, model or output cannot be used; 1 any other failure
"""


def build_parser() -> common.Parser:
    default = Options()
    parser = common.Parser(
        prog="gd-infer",
        description="Generate images from prompts, with a segmentation mask for every object you name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion_option(parser)
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompts", type=local_path, metavar="FILE", help="prompt file; - is standard input")
    what.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out lines of --prompts that cannot be used, listing each"
    )
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given repeatedly")
    what.add_argument("--out", metavar="DIR", help="folder to write to, or a URL such as s3://bucket/name (required)")
    what.add_argument(
        "--format", choices=FORMATS, default="folder", metavar="NAME", help="%(choices)s (default: folder)"
    )
    what.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    what.add_argument(
        "--seed", type=parse_seed, default=default.seed, metavar="N",
        help=f"seed of the data set; random draws one, once, and run.json has it (default: {default.seed})",
    )  # fmt: skip
    what.add_argument(
        "--val", type=float, metavar="SHARE", help="share of every class that is kept for validation, as in 0.1"
    )
    what.add_argument(
        "--overwrite", action="store_true", help="replace another run of ours in --out; this very run goes on"
    )
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="tell what would be made, how long it takes, and the disk and GPU memory it needs",
    )
    add_config_option(what)
    how = parser.add_argument_group("how to make it")
    how.add_argument("--model", type=local_path, metavar="BUNDLE", help="exported model (default: the shipped one)")
    add_sampling_options(how, "default: the model's own")
    how.add_argument(
        "--negative-prompt", metavar="TEXT",
        help='what not to draw; works where the prompt is guided. A JSON line may say its own "negative_prompt"',
    )  # fmt: skip
    how.add_argument("--size", type=parse_size, metavar="PIXELS", help="512 or HEIGHTxWIDTH (default: the model's own)")
    how.add_argument(
        "--threshold", type=float, default=default.threshold, metavar="P",
        help=f"probability above which a pixel is inside a mask (default: {default.threshold})",
    )  # fmt: skip
    how.add_argument(
        "--batch", type=int, metavar="N", help="images to one call of the network (default: the fastest here)"
    )
    how.add_argument(
        "--backend", choices=BACKENDS, default=DEFAULT_BACKEND, help=f"default: {DEFAULT_BACKEND}, on the CPU"
    )
    how.add_argument("--device", type=int, metavar="N", help="GPU (default: the first, or that of LOCAL_RANK)")
    how.add_argument(
        "--precision", choices=PRECISIONS,
        help="instead of --backend: bf16 and fastest use what the CPU has, by OpenVINO; fp32 gives the same bytes "
        "on every machine of a kind (default: fp32)",
    )  # fmt: skip
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    how.add_argument("--lanes", type=int, metavar="N", help="batches at once on the CPU (default: the fastest here)")
    how.add_argument(
        "--attempts", type=int, default=ATTEMPTS, metavar="N",
        help=f"noises to try for a sample that fails or is rejected (default: {ATTEMPTS})",
    )  # fmt: skip
    add_format_options(parser, band=True)
    add_filter_options(parser)
    add_sharing_options(parser)
    add_monitor_options(parser)
    add_output_options(parser)
    return parser


def add_sharing_options(parser: argparse.ArgumentParser) -> None:
    """How work is cut up, and who does it."""
    group = parser.add_argument_group(
        "shards", "a shard is made as a whole: what a killed worker loses, and one archive"
    )
    group.add_argument("--shard-size", type=int, metavar="N", help="samples of a shard (default: 16 batches or more)")
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="make only the shards of worker I of N, from 0; auto asks Slurm, Kubernetes, torchrun",
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="hand the shards to Ray's workers (default: start it here)",
    )
    group.add_argument("--workers", type=int, metavar="N", help="workers of --ray (default: one a GPU, or a CPU)")


def config_of(args: argparse.Namespace) -> RunConfig:
    """What a command line asks for. Raises UsageError."""
    if args.out is None:
        raise UsageError("the following arguments are required: --out; see gd-infer --help")
    names = ("out", "model", "skip_bad_lines", "format", "attempts", "backend", "precision", "device", "threads",
             "lanes", "val", "shard_size", "shard", "ray", "workers", "overwrite", "log", "metrics_file",
             "metrics_port")  # fmt: skip
    options = {field.name: getattr(args, field.name) for field in fields(Options)}
    if random := options["seed"] == RANDOM:
        options["seed"] = Options().seed
    return RunConfig(
        random_seed=random,
        prompt_file=args.prompts,
        prompts=args.prompt,
        options=Options(**options),
        format_options=format_options_of(args),
        filters=filters_of(args),
        **{name: getattr(args, name) for name in names},
    )


note = functools.partial(common.note, "gd-infer")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning in one line; its arguments are those of `warnings.showwarning`."""
    note(f"warning: {message}")


def run(args: argparse.Namespace, stop: Stop) -> int:
    """The whole command; returns the exit status."""
    config = config_of(args)
    say = (lambda line: None) if args.quiet else note
    run = open_run(config, say, stop, quick=args.dry_run)
    with run.pipe:
        if args.dry_run:
            found = estimate(run)
            print(json.dumps(asdict(found)) if args.json else "\n".join(found.lines()))
            return 0
        monitor = open_monitor(config, None if args.quiet else note)
        stop.last = functools.partial(last_words, monitor)
        return report(run, carry_out(run, monitor), args)


def last_words(monitor: Monitor, name: str) -> None:
    """Said before the program is ended while it is busy."""
    note(f"interrupted by {name}; what is not finished is dropped, and the same command goes on")
    monitor.close("interrupted")


def report(run: Run, result: DatasetResult, args: argparse.Namespace) -> int:
    """Say what came of it; returns the exit status."""
    show = print if not args.quiet and not args.json else lambda line: None
    if args.json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    if not result.finished:
        there, shards = len(finished_shards(run.storage)), len(run.shards)
        show(f"{run.config.share}: all of its {shards} shards are made; {there} of the run's {run.plan.shards} are")
        return LOST if result.accepted < result.samples else 0
    of = "" if result.accepted == result.samples else f" of {result.samples}"
    look = f"; look at {result.path}/index.html" if run.storage.exists("index.html") else ""
    show(f"{result.accepted}{of} images with {result.masks} masks in {result.path}{look}")
    if result.accepted == result.samples:
        return 0
    reasons = ", ".join(f"{reason} {n}" for reason, n in result.reasons.items())
    lost = f"{result.rejected} rejected, {result.quarantined} quarantined"
    note(f"{lost}: {reasons}; {result.path}/shards has each with its reason")
    return LOST


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""

    def body() -> int:
        with Stop() as stop, warnings.catch_warnings():
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = show_warning  # ty: ignore[invalid-assignment]
            return run(parse_with_config(build_parser(), sys.argv[1:] if argv is None else argv), stop)

    return common.run_command("gd-infer", body, FLAGS, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
