"""A data set from its configuration: what gd-infer does, for Python."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grounded_diffusion.engine.dataset.runfile import SUMMARY
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.monitor import Monitor, open_monitor
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.progress import Progress
from grounded_diffusion.engine.runs.ray import make_with_ray
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import Interrupted

LOGGER = logging.getLogger("grounded_diffusion")


@dataclass(frozen=True, slots=True)
class DatasetResult:
    """What came of a run: samples = accepted + rejected + quarantined.

    Attributes:
        path: the folder or URL.
        finished: whether the whole data set is there. It is not where `shard` gave this run a share of it and others
            are missing; the numbers are then those of the share.
        accepted: samples in the data set.
        rejected: samples that the filters refused at every attempt.
        quarantined: samples that could not be made.
        masks: of the accepted samples, empty ones included.
        reasons: of what is not accepted -> how many.
    """

    path: str
    finished: bool
    samples: int
    accepted: int
    rejected: int
    quarantined: int
    masks: int
    reasons: dict[str, int]


def make_dataset(config: RunConfig, *, on_progress: Callable[[Progress], None] | None = None) -> DatasetResult:
    """Make a data set, or what is missing of one. The files are those that gd-infer writes, byte for byte.

    It may be interrupted at any moment, also by an exception of `on_progress`: the same call goes on. Several processes
    may make one data set at the same time.

    Args:
        config: what to make, how, and where to.
        on_progress: called after every batch, in this thread. None shows a bar, on a terminal and in a notebook (which
            needs ipywidgets). What there is to say besides goes to the logger "grounded_diffusion".

    Raises:
        UsageError: a prompt or the output cannot be used, or `out` has a run with other settings.
        BundleError, BackendError: the model cannot be used.
        StorageError, DiskFullError: the output cannot be written; the same call goes on once it can.
    """
    run = open_run(config, LOGGER.info, Stop())
    with run.pipe:
        return carry_out(run, open_monitor(config, LOGGER.info, on_progress))


def carry_out(run: Run, monitor: Monitor) -> DatasetResult:
    """Make what is missing of a run, write the lists if all is there, and close the monitor. Raises as make_dataset,
    and Interrupted."""
    status = "failed"
    try:
        summary = make_missing(run, monitor)
        status = "complete" if summary else "share complete"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        monitor.close(status)
    counts = summary or run.count(run.shards)[0]
    return DatasetResult(path=run.storage.root, finished=summary is not None, **counts)


def make_missing(run: Run, monitor: Monitor) -> dict[str, Any] | None:
    """The summary of the data set once all of it is there; None after a share of it."""
    run.start()
    missing = run.missing()
    if missing and run.storage.exists(SUMMARY):
        run.storage.remove(SUMMARY)
    make = run.worker(monitor).run if run.config.ray is None else functools.partial(make_with_ray, run, monitor)
    total, lanes = run.samples(run.shards), run.pipe.backend.lanes if run.config.ray is None else 1
    monitor.begin(total, total - run.samples(missing), lanes)
    if missing:
        announce(run, missing)
        started = time.monotonic()
        make(missing)
        run.say(f"{monitor.accepted_images / (time.monotonic() - started):.2f} images/s")
    summary = run.finish(make)
    monitor.report()
    return summary


def announce(run: Run, missing: list[int]) -> None:
    """Say what is about to be made."""
    total, left, config = run.samples(run.shards), run.samples(missing), run.config
    if left < total:
        run.say(f"{total - left} of {total} images are there already")
    schedule, trained = run.pipe.schedule(config.options), run.pipe.bundle.manifest.capture_timestep
    capture = schedule.capture_index(trained)
    run.say(
        f"{left} images with {config.options.sampler}{f', {config.share}' if config.share else ''}; masks are read at "
        f"step {capture + 1} of {len(schedule.rows)}, timestep {schedule.rows[capture].timestep:g} (the head was "
        f"trained at {trained})"
    )
