"""What the device loop asks of a device: memory, streams, events, copies, kernels, and work captured for replay.

`cuda.CudaDevice` is the one for NVIDIA GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.bundle import Bundle
from grounded_diffusion.errors import BackendError

ALIGNMENT = 256  # bytes; TensorRT wants every tensor at such an address


class DeviceMemoryError(BackendError):
    """An allocation on the device has failed."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array in device memory, C-contiguous."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int) -> Tensor:
        """The first `count` rows."""
        return self.part(0, count)

    def part(self, start: int, count: int) -> Tensor:
        """`count` rows from row `start` on."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Tensor(self.pointer + start * row, (count, *self.shape[1:]), self.dtype)


class Device(Protocol):
    """One GPU. Pointers are integer device addresses; work on a stream happens in order and later.

    Attributes:
        name: what a person calls it.
        kernels: launchers with the signatures of kernels.cuda.launch.CudaKernels.
    """

    name: str
    kernels: Any

    def activate(self) -> None:
        """Make it the calling thread's device."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to ALIGNMENT. Raises DeviceMemoryError."""
        ...

    def free(self, pointer: int) -> None: ...

    def free_memory(self) -> int:
        """Bytes that could be allocated now."""
        ...

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory, uint8 [nbytes], that copies to and from the device without stopping the host."""
        ...

    def stream(self) -> Any: ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: Any) -> None: ...

    def wait(self, stream: Any, event: Any) -> None:
        """What comes on the stream from now on waits for what the event was last recorded after."""
        ...

    def sync(self, event: Any) -> None:
        """Stop the host until what the event was last recorded after is done."""
        ...

    def copy(self, stream: Any, to: int, source: int, nbytes: int) -> None:
        """Between device, or pinned, addresses."""
        ...

    def clear(self, stream: Any, pointer: int, nbytes: int) -> None:
        """Fill with zeros."""
        ...

    def capture(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream, without running it; calling the result puts all of it there."""
        ...


class Graphs(Protocol):
    """The networks of a bundle, ready for one bucket of sizes on a device.

    Attributes:
        bundle: whose networks they are; `Bundle.gpu_io` says what each of them takes and gives.
        capturable: whether a launch may be captured; a backend that captures by itself says no.
    """

    bundle: Bundle
    capturable: bool

    def dtype(self, graph: str, tensor: str) -> np.dtype:
        """Type of an input or output."""
        ...

    def mask_size(self) -> tuple[int, int]:
        """(h', w') of the mask logits."""
        ...

    def bind(self, graph: str, tensors: Mapping[str, Tensor], stream: Any) -> Callable[[], None]:
        """Tie a graph's inputs and outputs to device memory; calling the result puts one run on the stream.

        Everything that happens only once (loading, just-in-time compilation, the first run) happens here.

        Raises:
            DeviceMemoryError: it does not fit.
            BackendError: no such engine, or the graph fails.
        """
        ...

    def close(self) -> None:
        """Free what was bound."""
        ...


class Block:
    """Arrays side by side in one piece of memory, so that one copy moves all of them."""

    def __init__(self, arrays: Mapping[str, tuple[tuple[int, ...], Any]]):
        """`arrays` are shapes and types by name; they lie in this order."""
        self.arrays = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, (shape, dtype) in self.arrays.items():
            self.offsets[name] = self.nbytes
            self.nbytes += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def tensors(self, pointer: int) -> dict[str, Tensor]:
        """The arrays of a block at a device address."""
        return {name: Tensor(pointer + self.offsets[name], *kind) for name, kind in self.arrays.items()}

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of a block in host memory, uint8 [nbytes]."""
        views = {}
        for name, (shape, dtype) in self.arrays.items():
            start = self.offsets[name]
            views[name] = memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return views
