"""What is to be made, image by image, before anything is: jobs in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.sampling.options import Options


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: `index` within the run, and its noise's key (seed, draw)."""

    index: int
    prompt: Prompt
    seed: int
    draw: int

    @classmethod
    def of(cls, index: int, prompt: Prompt, number: int, seed: int) -> Job:
        """The job of a prompt's image `number`. A prompt with a seed of its own draws from that, wherever it stands.

        Args:
            seed: of prompts that have none.
        """
        if prompt.seed is None:
            return cls(index, prompt, seed, index)
        return cls(index, prompt, prompt.seed, number)


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample that could not be made, and why."""

    job: Job
    reason: str


def list_jobs(prompts: Iterable[Prompt], options: Options) -> list[Job]:
    """All images of some prompts."""
    jobs: list[Job] = []
    for prompt in prompts:
        for number in range(prompt.count or options.images_per_prompt):
            jobs.append(Job.of(len(jobs), prompt, number, options.seed))
    return jobs


def chunks(jobs: Iterable[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """Jobs in batches of `size`, the last one shorter."""
    jobs = iter(jobs)
    while chunk := tuple(islice(jobs, size)):
        yield chunk
