"""gd-infer: prompts in, images with masks out.

Exit status: 0 done, 2 a prompt, option or folder cannot be used, 1 any other failure, 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from grounded_diffusion import __version__
from grounded_diffusion.bundle import MANIFEST, sha256
from grounded_diffusion.engine.options import Options
from grounded_diffusion.engine.pipeline import GroundedPipeline, plan
from grounded_diffusion.engine.prompts import Prompt, as_prompts, read_prompts
from grounded_diffusion.engine.schedule import SAMPLERS
from grounded_diffusion.engine.writer import FolderWriter
from grounded_diffusion.errors import GroundedDiffusionError, UsageError

EXAMPLES = """\
prompt files:
  One prompt a line, the objects to mask in brackets:   a photograph of a [dog] and a [cat]
  Or a JSON line: {"prompt": "a busy street", "objects": ["car", "bus"], "seed": 3, "count": 4}
  Empty lines and lines that start with # are skipped.

examples:
  gd-infer --prompts prompts.txt --out out/
  gd-infer --prompt "a photograph of a [unicorn]" --images-per-prompt 16 --out out/ --sampler dpmpp-2m --steps 20

exit status: 0 done; 2 a prompt, option or folder cannot be used; 1 any other failure; 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    """Reports bad options as every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "512x768" -> (height, width)."""
    if not (match := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give pixels, as in 512, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def build_parser() -> Parser:
    default = Options()
    parser = Parser(
        prog="gd-infer",
        description="Generate images from prompts, with a segmentation mask for every object you name.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gd-infer {__version__}")
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="prompt file")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given repeatedly")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    what.add_argument(
        "--images-per-prompt", type=int, default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    what.add_argument("--seed", type=int, default=default.seed, help=f"seed of the data set (default: {default.seed})")
    old = what.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="finish what an interrupted run left in --out")
    old.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in --out")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--model", type=Path, metavar="BUNDLE", help="exported model (default: the shipped one)")
    how.add_argument("--steps", type=int, default=default.steps, help=f"denoising steps (default: {default.steps})")
    how.add_argument("--sampler", choices=SAMPLERS, default=default.sampler, help=f"default: {default.sampler}")
    how.add_argument(
        "--guidance-scale", type=float, default=default.guidance_scale, metavar="W",
        help=f"how strongly the prompt is followed; 1 turns guidance off (default: {default.guidance_scale})",
    )  # fmt: skip
    how.add_argument("--size", type=parse_size, metavar="PIXELS", help="512 or HEIGHTxWIDTH (default: the model's own)")
    how.add_argument(
        "--threshold", type=float, default=default.threshold, metavar="P",
        help=f"probability above which a pixel is inside a mask (default: {default.threshold})",
    )  # fmt: skip
    how.add_argument("--batch", type=int, metavar="N", help="images to one call of the network (default: by size)")
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser


def collect_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the file, then those of the command line."""
    if args.prompts is None and not args.prompt:
        raise UsageError("no prompts; give --prompts FILE or --prompt TEXT")
    prompts = read_prompts(args.prompts) if args.prompts else []
    return prompts + (as_prompts(args.prompt) if args.prompt else [])


def fingerprint(pipe: GroundedPipeline, prompts: list[Prompt], options: Options) -> dict[str, Any]:
    """The settings that decide what is made. Batch and threads do not."""
    settings = {"model": sha256(pipe.bundle.file(MANIFEST))}
    text = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    settings["prompts"] = hashlib.sha256(text.encode()).hexdigest()
    settings |= {key: value for key, value in asdict(options).items() if key != "batch"}
    return settings | {"size": list(options.image_size(pipe.bundle.manifest))}


class Progress:
    """Images done, images per second and time left: a bar on a terminal, a line now and then elsewhere."""

    EVERY = 10.0  # seconds between lines

    def __init__(self, total: int, done: int):
        from rich.console import Console

        self.console = Console(stderr=True)
        self.total, self.first, self.done = total, done, done
        self.started = self.told = time.monotonic()
        self.bar = None
        if self.console.is_terminal and total > done:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("[bold]generating"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, rate="")
            self.bar.start()

    @property
    def rate(self) -> float:
        """Images per second of this run."""
        return (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)

    def advance(self) -> None:
        self.done += 1
        if self.bar:
            self.bar.update(self.task, completed=self.done, rate=f"{self.rate:.2f} images/s")
        elif time.monotonic() - self.told >= self.EVERY:
            self.told = time.monotonic()
            left = round((self.total - self.done) / self.rate)
            note(f"{self.done} of {self.total} images, {self.rate:.2f} images/s, {left // 60}:{left % 60:02} left")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def note(line: str) -> None:
    """One line to the person who waits."""
    print(f"gd-infer: {line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    prompts = collect_prompts(args)
    names = ("steps", "guidance_scale", "sampler", "seed", "images_per_prompt", "batch", "threshold", "size")
    options = Options(**{name: getattr(args, name) for name in names})
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise UsageError(f"--threads must be from 1 to 1024, not {args.threads}")
    writer = FolderWriter(args.out, resume=args.resume, overwrite=args.overwrite)
    model = args.model
    if model is None:
        from grounded_diffusion.engine.shipped import shipped_bundle

        model = shipped_bundle(note)
    pipe = GroundedPipeline.open(model, threads=args.threads)
    pipe.generate(prompts, options)  # checks everything, makes nothing, before the folder is touched
    total = len(plan(prompts, options))
    done = writer.start(fingerprint(pipe, prompts, options))
    try:
        generate(pipe, prompts, options, writer, done, total)
    finally:
        writer.close()
    masks = sum(len(record["objects"]) for record in writer.records.values())
    print(f"{total} images with {masks} masks in {args.out}; look at {args.out / 'index.html'}")


def generate(
    pipe: GroundedPipeline, prompts, options: Options, writer: FolderWriter, done: set[int], total: int
) -> None:
    """The run itself, with its progress."""
    if done:
        note(f"{len(done)} of {total} images are there already")
    schedule, trained = pipe.schedule(options), pipe.bundle.manifest.capture_timestep
    capture = schedule.capture_index(trained)
    note(
        f"{total - len(done)} images with {options.sampler}; masks are read at step {capture + 1} of "
        f"{len(schedule.rows)}, timestep {schedule.rows[capture].timestep:g} (the head was trained at {trained})"
    )
    progress = Progress(total, len(done))
    try:
        for sample in pipe.generate(prompts, options, skip=done):
            writer.put(sample)
            progress.advance()
    except KeyboardInterrupt:
        note(f"interrupted with {progress.done} of {total} images made; the same command with --resume goes on")
        raise
    finally:
        progress.close()
    note(f"{progress.rate:.2f} images/s")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("once", UserWarning)
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            run(build_parser().parse_args(argv))
    except GroundedDiffusionError as error:
        note(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
