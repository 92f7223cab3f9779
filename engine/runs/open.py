"""From a RunConfig to a run: everything is checked, and nothing written."""

from __future__ import annotations

import json
import secrets
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

from grounded_diffusion.bundle import MANIFEST, Bundle, open_bundle, sha256
from grounded_diffusion.engine.backends.calibrate import CALIBRATED, calibrate, remembered
from grounded_diffusion.engine.backends.open import GpuElsewhere, backend_entry, cpu_backends, open_backend
from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.engine.dataset.formats import Classes, Settings, open_format
from grounded_diffusion.engine.dataset.formats.options import sorted_classes
from grounded_diffusion.engine.dataset.ours import check_foreign_files, check_output
from grounded_diffusion.engine.dataset.runfile import About, check_same
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage, check_writable
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.pipeline.shipped import shipped_bundle
from grounded_diffusion.engine.pipeline.tokenizer import Tokenizer
from grounded_diffusion.engine.prompts.file import SHOWN, PromptFile, all_of
from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.monitor import check_places
from grounded_diffusion.engine.runs.plan import Plan, default_shard_size, validation
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.schedule import build_schedule
from grounded_diffusion.errors import BackendError, UsageError

DRAWN_SEEDS = 1 << 32  # of ten digits at most, to be read and typed
LONG_SHOWN = 5  # prompts that are too long for the model and are shown


def open_run(config: RunConfig, say: Callable[[str], None], stop: Stop, *, quick: bool = False) -> Run:
    """Check everything that a configuration asks for, and open the model. What can be refused without it is first.

    Args:
        quick: measure nothing: what is fastest on this machine is only taken where it is known.
        say: takes a line for the person who waits.
        stop: looked at while prompts are checked, and later by the run.

    Raises:
        UsageError: a prompt or the output cannot be used, or the output has a run with other settings.
        BundleError, BackendError: the model cannot be used.
    """
    check_places(config)
    prompts = PromptFile(config.prompt_file, config.lines, config.options.images_per_prompt, config.skip_bad_lines)
    storage = open_storage(config.out)
    found = check_output(storage)
    if isinstance(storage, LocalStorage) and not quick:
        check_writable(storage.folder)
    bundle = open_bundle(config.model or shipped_bundle(say))
    tokenizer = Tokenizer(bundle)
    if config.skip_bad_lines:
        prompts = usable_prompts(config, prompts, tokenizer, say)
    run = settle(config, prompts, storage, bundle, tokenizer, found, say, stop, quick)
    if found and run.settings != found.settings:
        if not config.overwrite:
            check_same(storage.root, found.settings, run.settings)
        check_foreign_files(storage)
        run.pipe.close()
        run = settle(config, prompts, storage, bundle, tokenizer, None, say, stop, quick)  # takes nothing over from it
    return run


def usable_prompts(
    config: RunConfig, found: PromptFile, tokenizer: Tokenizer, say: Callable[[str], None]
) -> PromptFile:
    """The prompts that this model and this format can take; the others are listed."""
    classes = config.format_options.classes(config.format)

    def check(prompt: Prompt) -> None:
        for name in prompt.objects:
            tokenizer.encode_query(name)
        if classes and classes.names:
            classes.check(prompt.objects, f"the prompt {shorten(prompt.text)!r}")

    images = config.options.images_per_prompt
    prompts = PromptFile(config.prompt_file, config.lines, images, True, check, found.content)
    for reason in prompts.skipped:
        say(f"skipped {reason}")
    return prompts


def settle(
    config: RunConfig,
    prompts: PromptFile,
    storage: Storage,
    bundle: Bundle,
    tokenizer: Tokenizer,
    found: About | None,
    say: Callable[[str], None],
    stop: Stop,
    quick: bool,
) -> Run:
    """Open the model, and settle what is not asked for: as the run that was found has it, or as is best here."""
    before = found.settings if found else None
    config = replace(config, options=config.options.of_model(bundle.manifest))
    if config.random_seed:
        config = replace(config, random_seed=False, options=replace(config.options, seed=draw_seed(before, say)))
    sampler, steps = cast(str, config.options.sampler), cast(int, config.options.steps)
    build_schedule(bundle.manifest.scheduler, sampler, steps)  # raises, as the next does
    config.options.image_size(bundle.manifest)
    if config.filters.min_presence is not None and not bundle.tells_presence:
        raise UsageError("this model does not tell presence, so min_presence refuses nothing; train its head with "
                         "gd-train head --presence, or leave it out", "min_presence")  # fmt: skip
    written = format_settings(config, tokenizer, prompts, before, stop)
    if before and not config.overwrite:
        check_begun(config, storage.root, before, run_settings(config, bundle, prompts, written))
    backend = choose_backend(config, bundle, prompts.samples, before or {}, say, quick)
    config = replace(config, backend=backend, precision=None)
    batch, lanes = batch_and_lanes(config, bundle, prompts.samples, before or {}, say, quick)
    pipe = GroundedPipeline(bundle, backend_of(config, bundle, lanes))
    batch = batch or pipe.batch_size(config.options)
    shard_size = config.shard_size or (before or {}).get("shard_size") or default_shard_size(prompts.samples, batch)
    config = replace(config, options=replace(config.options, batch=batch), shard_size=shard_size)
    settings = run_settings(config, bundle, prompts, written)
    begun = found is not None and not found.clearing and before == settings
    in_val = None if config.val is None else validation(prompts, config.val, stop)
    plan = Plan(prompts, config.options.seed, batch, shard_size, in_val)
    format = open_format(config.format, written)
    return Run(config, pipe, plan, storage, format, settings, begun, say, stop)


def check_begun(config: RunConfig, root: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError where a run that was begun has other settings, as far as they are known so far."""
    asked = {"backend": config.precision is None, "batch": config.options.batch, "shard_size": config.shard_size}
    taken_over = {name: before.get(name) for name, value in asked.items() if not value}
    check_same(root, before, now | taken_over)


def draw_seed(before: dict[str, Any] | None, say: Callable[[str], None]) -> int:
    """The seed that the run was begun with, or a new one."""
    if before and isinstance(before.get("seed"), int):
        return before["seed"]
    seed = secrets.randbelow(DRAWN_SEEDS)
    say(f"drew the seed {seed}")
    return seed


def backend_of(config: RunConfig, bundle: Bundle, lanes: int) -> Backend:
    """The backend of a run; for Ray's driver one that only plans, where the workers are to have the GPUs."""
    if config.ray is not None and backend_entry(config.backend).device == "cuda":
        return GpuElsewhere(config.backend)
    return open_backend(config.backend, bundle, threads=config.threads, lanes=lanes, device=config.device)


def run_settings(config: RunConfig, bundle: Bundle, prompts: PromptFile, written: Settings) -> dict[str, Any]:
    """What run.json says: all that decides the bytes of a data set, as JSON takes it."""
    settings = {
        "model": sha256(bundle.file(MANIFEST)),
        "backend": config.backend,
        "prompts": prompts.digest,
        "samples": prompts.samples,
        **asdict(config.options),
        "size": config.options.image_size(bundle.manifest),
        "shard_size": config.shard_size,
        "attempts": config.attempts,
        **asdict(config.filters),
        "format": config.format,
        **written.as_json(),
    }
    if config.options.negative_prompt is None:
        del settings["negative_prompt"]  # earlier versions had none, and their runs go on
    if config.filters.min_presence is None:
        del settings["min_presence"]  # likewise
    if config.val is not None:
        settings["val"] = config.val
    return json.loads(json.dumps(settings))  # tuples as lists, as they will be read


def format_settings(
    config: RunConfig, tokenizer: Tokenizer, prompts: PromptFile, before: dict[str, Any] | None, stop: Stop
) -> Settings:
    """The format's settings, once all prompts are checked: those of a run that was begun have been."""
    classes = config.format_options.classes(config.format)
    same = before and before.get("prompts") == prompts.digest and before.get("format") == config.format
    if same and config.format_options.names is None:
        known = before.get("classes") or {}
        classes = Classes(tuple(known), tuple(known.values()))
    else:
        found = check_prompts(tokenizer, prompts, classes if classes and classes.names else None, stop)
        classes = sorted_classes(found) if classes is None else classes
    return config.format_options.settings(config.format, classes)


def choose_backend(
    config: RunConfig, bundle: Bundle, samples: int, before: dict[str, Any], say: Callable[[str], None], quick: bool
) -> str:
    """The backend asked for, or of those in the precision asked for: the one a run was begun with, or the fastest here.

    Raises BackendError where none computes in that precision here.
    """
    if config.precision is None:
        return config.backend
    found = cpu_backends(config.precision)
    if not found:
        raise BackendError(
            f"nothing computes in {config.precision} here: its CPU lacks the instructions, or openvino is not "
            "installed (pip install 'grounded-diffusion[openvino]')"
        )
    if before.get("backend") in found:
        return before["backend"]
    chosen = found[-1]
    if len(found) > 1 and samples >= CALIBRATED and not quick:
        options = replace(config.options, batch=config.options.batch or before.get("batch"))
        chosen = max(found, key=lambda name: calibrate(bundle, options, config.threads, say, name).rate)
    say(f"computing in {backend_entry(chosen).precision} by {chosen}")
    return chosen


def batch_and_lanes(
    config: RunConfig, bundle: Bundle, samples: int, before: dict[str, Any], say: Callable[[str], None], quick: bool
) -> tuple[int | None, int]:
    """Images to a batch, and batches at once: as asked for, as the run was begun, or what is fastest here.

    A batch of None is the backend's to choose.
    """
    options = replace(config.options, batch=config.options.batch or before.get("batch"))
    on_cpu = backend_entry(config.backend).device == "cpu"
    if on_cpu and samples >= CALIBRATED and None in (options.batch, config.lanes):
        found = remembered(bundle, options, config.threads, config.backend)
        if found is None and not quick:
            found = calibrate(bundle, options, config.threads, say, config.backend)
        if found:
            return found.batch, config.lanes or found.lanes
        say("which batch is fastest here is not known yet; a run of this size measures it first")
    return options.batch, config.lanes or 1


def check_prompts(tokenizer: Tokenizer, prompts: PromptFile, classes: Classes | None, stop: Stop) -> set[str]:
    """Check every prompt against the model, and against the classes where there are any; returns all names of objects.

    Raises:
        UsageError: prompts that cannot be used, with file and line, or names without tokens or class.
    """
    names: set[str] = set()
    shown: set[str] = set()
    problems: dict[str, UsageError] = {}
    too_long = 0
    for _, prompt in prompts:
        stop.check()
        try:
            for name in [name for name in prompt.objects if name not in names]:
                names.add(name)
                tokenizer.encode_query(name)
            if classes:
                classes.check(prompt.objects, f"the prompt {shorten(prompt.text)!r}")
        except UsageError as error:
            problems[str(error)] = error
            if len(problems) == SHOWN:
                break
            continue
        for text in filter(None, (prompt.text, prompt.negative_prompt)):
            if cut := tokenizer.what_is_cut(text):
                too_long += 1
                if len(shown) < LONG_SHOWN and text not in shown:
                    shown.add(text)
                    warnings.warn(cut, stacklevel=2)
    if problems:
        raise all_of(list(problems.values()), len(problems))
    if too_long > len(shown):
        warnings.warn(f"{too_long} prompts in all are too long", stacklevel=2)
    return names
