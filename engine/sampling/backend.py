"""What the engine asks of an inference backend: single graphs on NumPy arrays, and whole batches."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of a device's memory that a batch needs, and those that were free on it when the backend was opened."""

    needed: int
    free: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.free


class Backend(Protocol):
    """Runs the graphs of one bundle, wherever that is. A backend on the host is a `backends.host.HostBackend`."""

    name: str
    lanes: int  # batches under way that use all of the device; as many threads may call `run` at once

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs of one graph: the text encoder's, or in `denoise` those of every step.

        Names and shapes are those of `bundle.GRAPH_IO`. Inputs are converted to the types the graph wants;
        floating-point outputs come back as float32. The UNets also take latents and a timestep of B rows with a
        context of 2B: both halves of guidance then see them. Outputs are the backend's own buffers, valid until the
        same thread's next run of the same graph.

        Raises:
            BackendError: the graph cannot be loaded, or fails on these inputs.
        """
        ...

    def default_batch(self, latent_cells: int) -> int:
        """Images to a batch that keep the device busy without filling its memory; `latent_cells` is h * w."""
        ...

    def memory(self, batch: int, size: tuple[int, int]) -> MemoryNeed | None:
        """What a batch of images of a size (H, W) needs, counted before it is made; None where that is not known."""
        ...

    def submit(self, request: BatchRequest) -> Future[BatchResult]:
        """Queue a batch. The future raises NumericsError naming stage, step and sample, or BackendError."""
        ...

    def close(self) -> None:
        """Wait for what is under way and free what is held; nothing may be asked of the backend afterwards."""
        ...


def both_halves(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Inputs of a UNet with a row of latents and timestep per context; given for both halves of guidance, twice."""
    if len(inputs["latents"]) == len(inputs["context"]):
        return inputs
    return {**inputs, **{name: np.concatenate([inputs[name]] * 2) for name in ("latents", "timestep")}}
