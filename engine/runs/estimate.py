"""What a run will make, how long that takes and how much disk it needs, before anything is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from grounded_diffusion.engine.checks import duration
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.shards import encode_shard
from grounded_diffusion.engine.dataset.storage.local import megabytes
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.sampling.sample import Sample


def estimate(run: Run) -> Iterator[str]:
    """Make the first batches, write nothing, and tell line by line what all of them will take."""
    plan, missing = run.plan, run.missing()
    left, made = run.samples(missing), plan.shards - len(missing)
    classes = f", {len(run.settings['classes'])} classes" if run.settings["classes"] else ""
    share = f" by {run.config.share}" if run.config.share else ""
    yield f"prompts  {plan.prompts.prompts}{classes}"
    yield f"images   {plan.samples}; {left} to make{share}"
    yield f"shards   {plan.shards} of {plan.shard_size} images, in batches of {plan.batch}; {made} are there"
    seconds, size = measure(run)
    batches = sum(-(-len(plan.indices(shard)) // plan.batch) for shard in missing)
    rate = plan.batch / seconds
    yield f"time     about {duration(batches * seconds)} for one worker like this one, at {rate:.2f} images/s"
    yield f"disk     about {megabytes(round(left * size))}, {size / 1000:.1f} kB an image{free(run.storage.root)}"


def measure(run: Run) -> tuple[float, float]:
    """Seconds a batch, and bytes an image in the run's format, of as many batches as the backend makes at once."""
    batches, options = list(islice(run.plan.batches(run.plan.jobs(0)), run.pipe.backend.lanes)), run.config.options
    list(run.pipe.batches(batches, replace(options, steps=1, sampler="ddim")))  # opens sessions, makes buffers
    start = time.perf_counter()
    results = [result for batch in run.pipe.batches(batches, options) for result in batch]
    seconds = (time.perf_counter() - start) / len(batches)
    made = [result for result in results if isinstance(result, Sample)]
    encoded = [run.format.encode(Record.from_sample(sample, run.plan.split(sample.index))) for sample in made]
    files = list(run.format.pack(0, run.plan.shards, encoded))
    record = encode_shard(0, 0, [sample.row for sample in encoded], files)
    size = len(record) + sum(len(content) for _, content in files)
    return seconds, size / max(len(encoded), 1)


def free(root: str) -> str:
    """How much room there is, for a local folder."""
    if "://" in root:
        return ""
    folder = next(path for path in (Path(root).absolute(), *Path(root).absolute().parents) if path.is_dir())
    return f"; {megabytes(shutil.disk_usage(folder).free)} are free"
