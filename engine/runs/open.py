"""From a command line to a run: everything is checked, and nothing written."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from grounded_diffusion.bundle import MANIFEST, Bundle, open_bundle, sha256
from grounded_diffusion.engine.backends.calibrate import calibrate
from grounded_diffusion.engine.backends.open import backend_entry, open_backend
from grounded_diffusion.engine.checks import check_int, shorten
from grounded_diffusion.engine.cli.format_options import settings_of
from grounded_diffusion.engine.dataset.formats import WITHOUT_CLASSES, Classes, Settings, open_format
from grounded_diffusion.engine.dataset.storage.base import PARTIAL, SHARDS, Storage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.prompts.file import PromptFile
from grounded_diffusion.engine.runs.filters import filters_of
from grounded_diffusion.engine.runs.plan import MAX_ATTEMPTS, Plan, default_shard_size
from grounded_diffusion.engine.runs.run import RUN, Run, check_same, read_settings
from grounded_diffusion.engine.runs.share import parse_shard
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError

CALIBRATED = 256  # images from which it pays to try which batch is fastest on this machine
MAX_LANES = 64
LONG_SHOWN = 5  # prompts that are too long for the model and are shown


def open_run(args: argparse.Namespace, say: Callable[[str], None], stop: Stop) -> Run:
    """Check everything that a command line asks for, and open the model.

    Raises:
        UsageError: an option, a prompt or the output cannot be used, or the output has a run with other settings.
        BundleError, BackendError: the model cannot be used.
    """
    names = [field.name for field in fields(Options) if hasattr(args, field.name)]
    options, filters = Options(**{name: getattr(args, name) for name in names}), filters_of(args)
    check_int(args.attempts, "--attempts", 1, MAX_ATTEMPTS)
    if args.lanes is not None:
        check_int(args.lanes, "--lanes", 1, MAX_LANES)
    if args.threads is not None:
        check_int(args.threads, "--threads", 1, 1024)
    share = parse_shard(args.shard) if args.shard else None
    if args.overwrite and share and share.count > 1:
        raise UsageError("--overwrite with --shard would remove what other workers make; remove the output first")
    open_format(args.format, settings_of(args, args.format, []))
    prompts = PromptFile(args.prompts, args.prompt, options.images_per_prompt)
    storage = open_storage(args.out)
    check_output(storage, args.overwrite)
    before = None if args.overwrite else read_settings(storage)
    bundle = open_bundle(args.model or shipped(say))
    batch, lanes = batch_and_lanes(args, options, bundle, prompts.samples, before or {}, say)
    pipe = GroundedPipeline(bundle, open_backend(args.backend, bundle, threads=args.threads, lanes=lanes))
    options = replace(options, batch=batch or pipe.batch_size(options))
    shard_size = (before or {}).get("shard_size") if args.shard_size is None else args.shard_size
    if shard_size is None:
        shard_size = default_shard_size(prompts.samples, options.batch)
    plan = Plan(prompts, options.seed, options.batch, shard_size)
    pipe.schedule(options)  # raises for what the model's scheduler does not allow
    written = written_settings(args, pipe, prompts, before, stop)
    settings = {
        "model": sha256(bundle.file(MANIFEST)),
        "backend": args.backend,
        "prompts": prompts.digest,
        "samples": prompts.samples,
        **asdict(options),
        "size": options.image_size(bundle.manifest),
        "shard_size": shard_size,
        "attempts": args.attempts,
        **asdict(filters),
        "format": args.format,
        **asdict(written),
        "classes": {name: k for k, name in written.classes.items()},
    }
    settings = json.loads(json.dumps(settings))  # tuples as lists, as they will be read
    if before:
        check_same(storage.root, before, settings)
    return Run(pipe, plan, storage, open_format(args.format, written), options, filters, args.attempts, settings,
               share, before is not None, say, stop)  # fmt: skip


def written_settings(
    args: argparse.Namespace, pipe: GroundedPipeline, prompts: PromptFile, before: dict[str, Any] | None, stop: Stop
) -> Settings:
    """The format's settings, once all prompts are checked: those of a run that was begun have been."""
    if before and before.get("prompts") == prompts.digest and before.get("format") == args.format and not args.names:
        settings = settings_of(args, args.format, [])
        classes = before.get("classes") or {}
        return replace(settings, classes=Classes(tuple(classes), tuple(classes.values()))) if classes else settings
    settings = settings_of(args, args.format, check_prompts(pipe, prompts, stop))
    if args.format not in WITHOUT_CLASSES:
        for _, prompt in prompts:
            settings.classes.check(prompt.objects, f"the prompt {shorten(prompt.text)!r}")
    return settings


def shipped(say: Callable[[str], None]) -> Path:
    """The shipped model's bundle."""
    from grounded_diffusion.engine.pipeline.shipped import shipped_bundle

    return shipped_bundle(say)


def batch_and_lanes(
    args: argparse.Namespace,
    options: Options,
    bundle: Bundle,
    samples: int,
    before: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[int | None, int]:
    """Images to a batch, and batches at once: as asked for, as the run was begun, or what is fastest here.

    A batch of None is the backend's to choose.
    """
    batch = options.batch or before.get("batch")
    on_cpu = backend_entry(args.backend).device == "cpu"
    if on_cpu and samples >= CALIBRATED and None in (batch, args.lanes):
        found = calibrate(bundle, replace(options, batch=batch), args.threads, say, args.backend)
        return found.batch, args.lanes or found.lanes
    options.image_size(bundle.manifest)  # raises for a size that the model cannot make
    return batch, args.lanes or 1


def check_output(storage: Storage, overwrite: bool) -> None:
    """Raise UsageError unless the output is empty or a run of ours."""
    folder = Path(storage.root)
    if folder.is_file():
        raise UsageError(f"{folder} is a file; give --out a folder")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set(storage.list(""))
    if found - {PARTIAL, SHARDS} and RUN not in found:
        raise UsageError(f"{storage.root} is not empty and was not written by gd-infer; choose another --out")


def check_prompts(pipe: GroundedPipeline, prompts: PromptFile, stop: Stop) -> set[str]:
    """Check every prompt against the model; returns all names of objects.

    Raises:
        UsageError: a prompt that cannot be used, with its file and line, or a name without tokens.
    """
    names: set[str] = set()
    shown: set[str] = set()
    cut = 0
    for _, prompt in prompts:
        stop.check()
        for name in prompt.objects:
            if name not in names:
                pipe.tokenizer.encode_query(name)
                names.add(name)
        if dropped := pipe.tokenizer.encode(prompt.text).dropped:
            cut += 1
            if len(shown) < LONG_SHOWN and prompt.text not in shown:
                shown.add(prompt.text)
                warnings.warn(
                    f"the prompt {shorten(prompt.text)!r} is over {pipe.bundle.manifest.context_length} tokens; the "
                    f"model does not see its end: {shorten(' '.join(dropped), 200)!r}",
                    stacklevel=2,
                )
    if cut > len(shown):
        warnings.warn(f"{cut} prompts in all are too long", stacklevel=2)
    return names
