"""A backend on a GPU: batches are submitted and collected, in buckets of sizes that stay allocated."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from grounded_diffusion.bundle import CONTEXT, GPU, GRAPH_IO, UNET, Bundle
from grounded_diffusion.engine.backends.gpu.device import Device, DeviceMemoryError, Graphs
from grounded_diffusion.engine.backends.gpu.loop import DeviceLoop, QueuedBatch, Replay
from grounded_diffusion.engine.backends.gpu.memory import Sizes, Streams
from grounded_diffusion.engine.backends.gpu.needs import sizes_of
from grounded_diffusion.engine.backends.host import LATENT_CELLS, default_batch
from grounded_diffusion.engine.sampling.backend import Arrays, MemoryNeed
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult
from grounded_diffusion.engine.sampling.options import MAX_BATCH
from grounded_diffusion.errors import BackendError

LOOPS = 3  # buckets kept open at once; opening one more closes the one used longest ago
GPU_LATENT_CELLS = 16 * LATENT_CELLS  # to a batch; one image of Stable Diffusion leaves a GPU half idle
OBJECTS = 8  # objects are padded to a multiple of this where a backend takes any number
T = TypeVar("T")


class GraphRuntime(Protocol):
    """A library that runs a bundle's graphs on a device."""

    name: str

    def buckets(self, batch: int, objects: int, size: tuple[int, int]) -> list[tuple[int, int]] | None:
        """(batch, objects) of what can be opened with at least these objects at an image size; None: any.

        Raises:
            BackendError: nothing can be opened; the message says what would be needed for `batch`.
        """
        ...

    def open(self, sizes: Sizes, streams: Streams) -> Graphs:
        """The graphs for one bucket. Raises BackendError, DeviceMemoryError."""
        ...

    def memory(self, sizes: Sizes) -> int | None:
        """Bytes of the device's memory that a bucket needs, with its loop's arrays; None where that is not known."""
        ...

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], streams: Streams) -> Arrays:
        """One of `Bundle.gpu_io`, from and to host memory; returns when it is done, with float32."""
        ...

    def close(self) -> None:
        """Free what `run` has opened."""
        ...


def smallest(buckets: Sequence[tuple[int, int]], batch: int) -> tuple[int, int]:
    """Of (batch, objects), the smallest that takes `batch` images, or the largest that there is."""
    enough = [bucket for bucket in buckets if bucket[0] >= batch]
    return min(enough) if enough else max(buckets, key=lambda bucket: (bucket[0], -bucket[1]))


class DeviceBackend:
    """Runs whole batches on a device; also single graphs, as any Backend.

    All calls of the device come from one thread: captured graphs of ONNX Runtime belong to the thread that made them.

    Args:
        bundle: the opened bundle.
        device: where it runs.
        runtime: what runs its graphs.
        replay: what the device loop captures.

    Raises:
        BackendError: the bundle has no graphs for a GPU.
    """

    lanes = 2  # batches under way in the pipeline: one runs while the next is queued

    def __init__(self, bundle: Bundle, device: Device, runtime: GraphRuntime, replay: Replay = "step"):
        if f"{GPU}{UNET}" not in bundle.manifest.files:
            raise BackendError(
                f"{bundle.path} has no graphs for a GPU, an earlier version made it; run gd-export again"
            )
        self.bundle, self.device, self.runtime, self.replay = bundle, device, runtime, replay
        self.name = runtime.name
        self._thread = ThreadPoolExecutor(1, "device", initializer=device.activate)
        self._collectors = ThreadPoolExecutor(self.lanes, "collect")
        self._streams = self._call(Streams.on, device)
        self._free = self._call(device.free_memory)  # bytes: what is opened from now on can be closed again
        self._loops: OrderedDict[Sizes, DeviceLoop] = OrderedDict()
        self._largest: dict[tuple[int, int], int] = {}  # batch asked for yet, by image size
        self._limits: dict[tuple[int, int], int] = {}  # batch that is known to be allowed, by image size

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        return self._thread.submit(function, *args).result()

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """See `Backend.run`."""
        if "context" in GRAPH_IO[graph][0]:
            made = self._call(self.runtime.run, CONTEXT, {"context": inputs["context"]}, self._streams)
            inputs = {name: value for name, value in inputs.items() if name != "context"} | made
        return self._call(self.runtime.run, graph, inputs, self._streams)

    def default_batch(self, latent_cells: int) -> int:
        """See `Backend.default_batch`."""
        return default_batch(latent_cells, GPU_LATENT_CELLS)

    def memory(self, batch: int, size: tuple[int, int]) -> MemoryNeed | None:
        """See `Backend.memory`."""
        buckets = self.runtime.buckets(batch, OBJECTS, size) or [(batch, OBJECTS)]
        needed = self.runtime.memory(sizes_of(self.bundle, *smallest(buckets, batch), size))
        return None if needed is None else MemoryNeed(needed, self._free)

    def submit(self, request: BatchRequest) -> Future[BatchResult]:
        """See `Backend.submit`: queued at once; bytes and masks are made and copied while later batches run."""
        return self._collectors.submit(self._collect, self._thread.submit(self._enqueue, request))

    @staticmethod
    def _collect(queued: Future[list[QueuedBatch]]) -> BatchResult:
        """Wait for a batch and join the parts it was split into."""
        return BatchResult.join([part.result() for part in queued.result()])

    def close(self) -> None:
        """Wait for what is under way, free the device's memory and end the thread."""
        self._collectors.shutdown()
        for loop in self._loops.values():
            self._call(loop.close)
        self._loops.clear()
        self._call(self.runtime.close)
        self._thread.shutdown()

    def _enqueue(self, request: BatchRequest) -> list[QueuedBatch]:
        """Queue a batch, in parts where it does not fit the device as a whole."""
        queued, start, count = [], 0, len(request.noise)
        while start < count:
            sizes = self._sizes(request, count - start)
            stop = min(count, start + sizes.batch)
            part = request if (start, stop) == (0, count) else request.part(start, stop)
            try:
                queued.append(self._loop(sizes).enqueue(part))
                start = stop
            except DeviceMemoryError as error:
                self._make_room(sizes, error)
        return queued

    def _sizes(self, request: BatchRequest, batch: int) -> Sizes:
        """The smallest bucket that takes `batch` images, or the largest that there is and that fits."""
        size = tuple(request.size)
        objects = request.conditioning.query_valid.shape[1]
        limit = self._limits.get(size, MAX_BATCH)
        buckets = self.runtime.buckets(batch, objects, size)
        if buckets is None:  # any: the largest batch yet, a quarter of it, and so on
            largest = self._largest[size] = min(limit, max(batch, self._largest.get(size, 0)))
            padded = -(-objects // OBJECTS) * OBJECTS
            buckets = [(largest >> k, padded) for k in range(0, largest.bit_length(), 2)]
        fitting = [bucket for bucket in buckets if bucket[0] <= limit]
        if not fitting:
            raise BackendError(f"no engine is small enough for {self.device.name}; build one with --batch {limit}")
        return sizes_of(self.bundle, *smallest(fitting, batch), size)

    def _loop(self, sizes: Sizes) -> DeviceLoop:
        if sizes not in self._loops:
            while len(self._loops) >= LOOPS:
                self._loops.popitem(last=False)[1].close()
            graphs = self.runtime.open(sizes, self._streams)
            self._loops[sizes] = DeviceLoop(self.device, graphs, sizes, self._streams, self.replay)
        self._loops.move_to_end(sizes)
        return self._loops[sizes]

    def _make_room(self, sizes: Sizes, error: DeviceMemoryError) -> None:
        """After this, what did not fit may be tried again: beside nothing else or, if it was alone, at half the batch.

        Raises:
            DeviceMemoryError: one image did not fit alone.
        """
        alone = not self._loops.keys() - {sizes}
        while self._loops:
            self._loops.popitem()[1].close()
        if not alone:
            return
        height, width = sizes.image
        limit, place = sizes.batch // 2, f"at {height}x{width} in the memory of {self.device.name}"
        if not limit:
            raise DeviceMemoryError(
                f"not even one image fits {place} ({error}); use a smaller --size, a bundle exported with "
                "--precision fp16, or a GPU with more memory"
            ) from None
        self._limits[sizes.image] = limit
        warnings.warn(
            f"a batch of {sizes.batch} does not fit {place}; going on with {limit}, as with --batch {limit}",
            stacklevel=2,
        )
