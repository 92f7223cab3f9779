"""What backends share that only run graphs: whole batches by the loop of `denoise`, one to a lane."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from grounded_diffusion.engine.sampling.backend import Arrays, MemoryNeed
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult
from grounded_diffusion.engine.sampling.denoise import make_batch

LATENT_CELLS = 4096  # to a batch: 16 images at 16x16 latents, 1 at the 64x64 of Stable Diffusion
LARGEST = 16  # images to a batch, unless asked otherwise


def default_batch(latent_cells: int, room: int = LATENT_CELLS) -> int:
    """Images of h * w latent cells that fill `room` cells, at most LARGEST."""
    return max(1, min(LARGEST, room // latent_cells))


class HostBackend(ABC):
    """A Backend whose loop, epilogues and buffers are on the host. A new one has to say `name` and `run`.

    Args:
        lanes: batches at once, each in a thread of its own.
    """

    name: str

    def __init__(self, lanes: int = 1):
        self.lanes = lanes
        self._pool = ThreadPoolExecutor(lanes, "lane")

    @abstractmethod
    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """See `Backend.run`; called by several threads."""

    def default_batch(self, latent_cells: int) -> int:
        """See `Backend.default_batch`."""
        return default_batch(latent_cells)

    def memory(self, batch: int, size: tuple[int, int]) -> MemoryNeed | None:
        """See `Backend.memory`: a host pages out what does not fit."""
        return None

    def submit(self, request: BatchRequest) -> Future[BatchResult]:
        """See `Backend.submit`: a batch waits here until a lane is free."""
        return self._pool.submit(make_batch, self, request)

    def close(self) -> None:
        """See `Backend.close`."""
        self._pool.shutdown()
