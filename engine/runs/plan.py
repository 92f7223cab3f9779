"""What a run will make, before it makes anything: samples with their noise, in batches, in shards.

The plan follows from prompts and settings alone. Batches never cross a shard, so that a shard has the same bytes
whoever makes it and however often it was begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from grounded_diffusion.engine.checks import check_int
from grounded_diffusion.engine.dataset.record import SPLITS
from grounded_diffusion.engine.dataset.splits import Splitter
from grounded_diffusion.engine.pipeline.job import Job, chunks
from grounded_diffusion.engine.prompts.file import PromptFile
from grounded_diffusion.engine.runs.stop import Stop

MAX_SHARD = 1_000_000
BATCHES = 16  # to a shard, unless asked otherwise: little is lost when a worker is killed
SHARDS = 10_000  # at most, unless asked otherwise: a folder of that many records is still quickly listed
RETRY = 1 << 40  # from an attempt's draw to the next one's: more than the images that a seed can have
MAX_ATTEMPTS = 1000


@dataclass(frozen=True, slots=True)
class Plan:
    """All samples of a run. Each is the same at any time and on any machine.

    Attributes:
        prompts: what to draw, and how often.
        seed: of prompts that have no seed of their own.
        batch: images to one call of the network.
        shard_size: samples of a shard; the last one may have fewer.
        in_val: bool [samples], whether a sample is kept for validation; None has none.

    Raises:
        UsageError: a size outside its range.
    """

    prompts: PromptFile
    seed: int
    batch: int
    shard_size: int
    in_val: np.ndarray | None = None

    def __post_init__(self):
        check_int(self.shard_size, "shard_size", 1, MAX_SHARD)

    @property
    def samples(self) -> int:
        return self.prompts.samples

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_size)

    def indices(self, shard: int) -> range:
        """The samples of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.samples))

    def split(self, index: int) -> str:
        """The split of a sample."""
        return SPLITS[int(self.in_val is not None and self.in_val[index])]

    def jobs(self, shard: int) -> list[Job]:
        """The samples of a shard."""
        indices = self.indices(shard)
        between = self.prompts.between(indices.start, indices.stop)
        return [Job.of(index, prompt, number, self.seed) for index, prompt, number in between]

    def batches(self, jobs: list[Job]) -> Iterator[tuple[Job, ...]]:
        """Samples of one shard in batches."""
        return chunks(jobs, self.batch)


def validation(prompts: PromptFile, share: float, stop: Stop) -> np.ndarray:
    """Whether each sample is kept for validation, bool [samples]: as many of every class as its share asks for."""
    splitter, chosen = Splitter(share), np.zeros(prompts.samples, np.bool_)
    index = 0
    for count, prompt in prompts:
        stop.check()
        for _ in range(count):
            chosen[index] = splitter.in_val(index, prompt.objects)
            index += 1
    return chosen


def default_shard_size(samples: int, batch: int) -> int:
    """BATCHES batches to a shard, or more where that would be over SHARDS shards."""
    return batch * max(BATCHES, -(-samples // (SHARDS * batch)))


def next_attempt(job: Job) -> Job:
    """The same sample with other noise."""
    return replace(job, draw=job.draw + RETRY)
