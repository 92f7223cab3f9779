"""An NVIDIA GPU as the device loop's Device: cuda-core for streams and kernels, the driver API for the rest."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError
from grounded_diffusion.errors import BackendError
from grounded_diffusion.kernels.cuda.launch import CudaKernels

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # what torchrun and Slurm tell the processes of one machine
REPAIR = "check nvidia-smi; the process has to be started again"


class CudaDevice:
    """One GPU.

    Args:
        number: which one, of those that CUDA_VISIBLE_DEVICES leaves; None takes `choose_device`.

    Attributes:
        lock: held while a thread waits for an event. Who captures in CUDA's global mode, as ONNX Runtime does, holds it
            meanwhile: a wait of another thread would break the graph.

    Raises:
        BackendError: no GPU, no driver, or cuda-core is not installed.
    """

    def __init__(self, number: int | None = None) -> None:
        self.number = choose_device() if number is None else number
        self.kernels = CudaKernels(self.number)
        self._device = self.kernels.device
        from cuda.bindings import driver

        self._driver = driver
        self.name, self.arch = str(self._device.name), int(self._device.arch)
        self.lock = threading.RLock()

    def _call(self, answer: tuple, doing: str) -> Any:
        """What a driver call gave. Raises DeviceMemoryError, BackendError."""
        code, *rest = answer
        if int(code) == 0:
            return rest[0] if rest else None
        if code == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free = self.free_memory()
            raise DeviceMemoryError(f"{self.name} is out of memory while {doing}, {free / 1e9:.1f} GB are free")
        raise BackendError(f"{self.name} failed while {doing}: {code.name}; {REPAIR}")

    def activate(self) -> None:
        """See `Device`."""
        self._device.set_current()

    def allocate(self, nbytes: int) -> int:
        """See `Device`."""
        return int(self._call(self._driver.cuMemAlloc(max(1, nbytes)), f"allocating {nbytes / 1e9:.2f} GB"))

    def free(self, pointer: int) -> None:
        """See `Device`. The driver waits for work that uses the memory."""
        self._call(self._driver.cuMemFree(pointer), "freeing memory")

    def free_memory(self) -> int:
        """See `Device`."""
        code, free, _ = self._driver.cuMemGetInfo()
        return int(free) if int(code) == 0 else 0

    def pinned(self, nbytes: int) -> np.ndarray:
        """See `Device`. The memory is freed with the array and its views."""
        size = max(1, nbytes)
        pointer = int(self._call(self._driver.cuMemHostAlloc(size, 0), f"allocating {nbytes / 1e9:.2f} GB of the host"))
        memory = (ctypes.c_uint8 * size).from_address(pointer)
        weakref.finalize(memory, self._driver.cuMemFreeHost, pointer).atexit = False
        return np.ctypeslib.as_array(memory)[:nbytes]

    def stream(self) -> Any:
        """See `Device`."""
        return self._device.create_stream()

    def event(self) -> Any:
        """See `Device`. A thread that waits for it sleeps."""
        from cuda.core import EventOptions

        return self._device.create_event(EventOptions(blocking_sync=True))

    def record(self, event: Any, stream: Any) -> None:
        """See `Device`."""
        stream.record(event)

    def wait(self, stream: Any, event: Any) -> None:
        """See `Device`."""
        stream.wait(event)

    def sync(self, event: Any) -> None:
        """See `Device`. What has failed on the device since is met here."""
        try:
            with self.lock:
                event.sync()
        except Exception as error:  # cuda-core's own class
            raise BackendError(f"{self.name} failed while running a batch: {error}; {REPAIR}") from None

    def copy(self, stream: Any, to: int, source: int, nbytes: int) -> None:
        """See `Device`."""
        self._call(self._driver.cuMemcpyAsync(to, source, nbytes, stream.handle), "copying")

    def clear(self, stream: Any, pointer: int, nbytes: int) -> None:
        """See `Device`."""
        self._call(self._driver.cuMemsetD8Async(pointer, 0, nbytes, stream.handle), "clearing memory")

    def capture(self, stream: Any, work: Callable[[], None]) -> Callable[[], None]:
        """See `Device`: a CUDA graph. Relaxed, so that other threads may go on using the device meanwhile."""
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._call(driver.cuStreamBeginCapture(stream.handle, mode), "beginning a CUDA graph")
        try:
            work()
        finally:  # a stream left in capture would refuse everything that follows
            answer = driver.cuStreamEndCapture(stream.handle)
        graph = self._call(answer, "capturing a CUDA graph")
        try:
            executable = self._call(driver.cuGraphInstantiate(graph, 0), "instantiating a CUDA graph")
        finally:
            driver.cuGraphDestroy(graph)

        def replay() -> None:
            self._call(driver.cuGraphLaunch(executable, stream.handle), "launching a CUDA graph")

        weakref.finalize(replay, driver.cuGraphExecDestroy, executable).atexit = False
        return replay


def choose_device() -> int:
    """The GPU of this process: its rank among those on this machine where a launcher has set one, and else the first.

    Ranks go round the GPUs that the process sees: with one each, as CUDA_VISIBLE_DEVICES often leaves it, all take 0.
    """
    rank = next((os.environ[name] for name in LOCAL_RANKS if os.environ.get(name, "").isdigit()), "0")
    return int(rank) % max(1, visible_devices())


def visible_devices() -> int:
    """GPUs that this process may use; 0 without a driver."""
    try:
        from cuda.bindings import driver

        driver.cuInit(0)
        code, count = driver.cuDeviceGetCount()
    except (ImportError, RuntimeError):  # RuntimeError: cuda-bindings finds no driver
        return 0
    return count if int(code) == 0 else 0
