"""What a run will make, how long that takes and how much disk it needs, before anything is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

from grounded_diffusion.engine.checks import duration
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.shards import encode_shard
from grounded_diffusion.engine.dataset.storage.local import megabytes
from grounded_diffusion.engine.pipeline.job import Failed
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.sampling.backend import MemoryNeed
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.sample import Sample

FEW = 4  # steps that are timed, of a run of more
LONG = 0.5  # seconds of a step from which two are enough


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run comes to.

    Attributes:
        prompts, classes: how many there are.
        images, left: of the run, and of those the ones that this process has to make.
        share: of the run, where this process has one.
        shards, shard_size, batch, made: how the images are cut up, and shards that are there.
        seconds: for all that is left, by one worker like this one.
        images_per_second: of such a worker.
        memory: of a GPU, what a batch needs, by count; None: not known.
        bytes: of all that is left.
        free: bytes that the disk has; None for a URL.
    """

    prompts: int
    classes: int
    images: int
    left: int
    share: str
    shards: int
    shard_size: int
    batch: int
    made: int
    seconds: float
    images_per_second: float
    memory: MemoryNeed | None
    bytes: int
    free: int | None

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        classes = f", {self.classes} classes" if self.classes else ""
        yield f"prompts  {self.prompts}{classes}"
        yield f"images   {self.images}; {self.left} to make{f' by {self.share}' if self.share else ''}"
        cut = f"{self.shards} of {self.shard_size} images, in batches of {self.batch}"
        yield f"shards   {cut}; {self.made} are there"
        rate = f"{self.images_per_second:.2f} images/s"
        yield f"time     about {duration(self.seconds)} for one worker like this one, at {rate}"
        if self.memory:
            fits = "" if self.memory.fits else ": too many, a smaller --batch is needed"
            needs = f"a batch of {self.batch} needs about {self.memory.needed / 1e9:.1f} GB of the GPU"
            yield f"memory   {needs}; {self.memory.free / 1e9:.1f} GB are free{fits}"
        each = self.bytes / 1000 / max(self.left, 1)
        free = "" if self.free is None else f"; {megabytes(self.free)} are free"
        yield f"disk     about {megabytes(self.bytes)}, {each:.1f} kB an image{free}"


def estimate(run: Run) -> Estimate:
    """Try the first batches with a few steps, and reckon what all of them will take. Nothing is written."""
    plan, missing = run.plan, run.missing()
    left = run.samples(missing)
    need = run.pipe.backend.memory(plan.batch, run.config.options.image_size(run.pipe.bundle.manifest))
    seconds, size = measure(run)
    batches = sum(-(-len(plan.indices(shard)) // plan.batch) for shard in missing)
    return Estimate(
        prompts=plan.prompts.prompts, classes=len(run.settings["classes"]), images=plan.samples, left=left,
        share=str(run.config.share or ""), shards=plan.shards, shard_size=plan.shard_size, batch=plan.batch,
        made=plan.shards - len(missing), seconds=batches * seconds, images_per_second=plan.batch / seconds,
        memory=need, bytes=round(left * size), free=free(run.storage.root),
    )  # fmt: skip


def measure(run: Run) -> tuple[float, float]:
    """Seconds a batch, and bytes an image in the run's format, of as many batches as the backend makes at once."""
    batches, options = list(islice(run.plan.batches(run.plan.jobs(0)), run.pipe.backend.lanes)), run.config.options
    results: list[Sample | Failed] = []

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        results[:] = [made for batch in run.pipe.batches(batches, replace(options, steps=steps)) for made in batch]
        return (time.perf_counter() - start) / len(batches)

    seconds(1)  # opens sessions, makes buffers
    one = total = seconds(1)
    all_steps = cast(int, options.steps)
    few = min(all_steps, FEW if one < LONG else 2)
    if few > 1:
        slope = max((seconds(few) - one) / (work(options, few) - work(options, 1)), 0.0)
        total = max(one + slope * (work(options, all_steps) - work(options, 1)), one)
    made = [result for result in results if isinstance(result, Sample)]
    encoded = [run.format.encode(Record.from_sample(sample, run.plan.split(sample.index))) for sample in made]
    files = list(run.format.pack(0, run.plan.shards, encoded))
    record = encode_shard(0, 0, [sample.row for sample in encoded], files)
    size = len(record) + sum(len(content) for _, content in files)
    return total, size / max(len(encoded), 1)


def work(options: Options, steps: int) -> float:
    """What some steps cost, in guided ones: outside the guided interval only half of the network's rows run."""
    start, end = cast(tuple[float, float], options.guidance_interval)
    guided = sum(start <= step / steps < end for step in range(steps)) if options.guidance_scale != 1 else 0
    return guided + (steps - guided) / 2


def free(root: str) -> int | None:
    """How much room there is, for a local folder."""
    if "://" in root:
        return None
    folder = next(path for path in (Path(root).absolute(), *Path(root).absolute().parents) if path.is_dir())
    return shutil.disk_usage(folder).free
