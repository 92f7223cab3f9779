"""What the engine asks of an inference backend: run a graph of the bundle on NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Backend(Protocol):
    """Runs the graphs of one bundle.

    Names and shapes of inputs and outputs are those of `bundle.GRAPH_IO`. Inputs are converted to the types the
    graph wants; floating-point outputs come back as float32. The UNets also take latents and a timestep of B rows with
    a context of 2B: both halves of guidance then see them.
    """

    name: str
    lanes: int  # how many threads may call `run` at once to use all of the device

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs of a graph. They are the backend's own buffers, valid until the same thread's next run of the same
        graph.

        Raises:
            BackendError: the graph cannot be loaded, or fails on these inputs.
        """
        ...


def both_halves(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Inputs of a UNet with a row of latents and timestep per context; given for both halves of guidance, twice."""
    if len(inputs["latents"]) == len(inputs["context"]):
        return inputs
    return {**inputs, **{name: np.concatenate([inputs[name]] * 2) for name in ("latents", "timestep")}}
