"""Backends by name: the one table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from grounded_diffusion.bundle import FP8, GPU, Bundle
from grounded_diffusion.engine.backends.gpu.backend import GPU_LATENT_CELLS, DeviceBackend
from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice
from grounded_diffusion.engine.backends.gpu.loop import Replay
from grounded_diffusion.engine.backends.gpu.onnxruntime_cuda import OnnxRuntimeCuda, load_runtime
from grounded_diffusion.engine.backends.gpu.tensorrt import TensorRT
from grounded_diffusion.engine.backends.host import default_batch
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.openvino_cpu import OpenVinoBackend, chip_precisions
from grounded_diffusion.engine.backends.tensorrt.spec import load_module
from grounded_diffusion.engine.sampling.backend import Arrays, Backend, MemoryNeed
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult
from grounded_diffusion.errors import BackendError, UsageError


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One backend.

    Attributes:
        device: where it runs.
        precision: it computes in; None is that of the bundle.
        open: opens it with (bundle, threads, lanes, replay, device), of which it takes what concerns it.
    """

    device: Literal["cpu", "cuda"]
    precision: str | None
    open: Callable[[Bundle, int | None, int, Replay, int | None], Backend]


def _open_onnxruntime(bundle: Bundle, threads: int | None, lanes: int, replay: Replay, number: int | None) -> Backend:
    return OnnxRuntimeBackend(bundle, threads, lanes)


def _open_openvino(
    precision: str, bundle: Bundle, threads: int | None, lanes: int, replay: Replay, number: int | None
) -> Backend:
    return OpenVinoBackend(bundle, threads, lanes, precision)


def _open_cuda(bundle: Bundle, threads: int | None, lanes: int, replay: Replay, number: int | None) -> Backend:
    load_runtime()  # what is missing is said in the order in which it is installed
    device = CudaDevice(number)
    return DeviceBackend(bundle, device, OnnxRuntimeCuda(bundle, device), replay)


def _open_tensorrt(
    package: str, variant: str, bundle: Bundle, threads: int | None, lanes: int, replay: Replay, number: int | None
) -> Backend:
    load_module(package)
    device = CudaDevice(number)
    return DeviceBackend(bundle, device, TensorRT(bundle, package, device, variant), replay)


DEFAULT_BACKEND = "onnxruntime"
BACKENDS = {
    DEFAULT_BACKEND: BackendEntry("cpu", "fp32", _open_onnxruntime),
    "openvino": BackendEntry("cpu", "fp32", partial(_open_openvino, "fp32")),
    "openvino-bf16": BackendEntry("cpu", "bf16", partial(_open_openvino, "bf16")),
    "openvino-int8": BackendEntry("cpu", "int8", partial(_open_openvino, "int8")),
    "cuda": BackendEntry("cuda", None, _open_cuda),  # ONNX Runtime
    # Engines that `gd-export --engine` built, with --fp8 for the last two.
    "tensorrt": BackendEntry("cuda", None, partial(_open_tensorrt, "tensorrt", GPU)),
    "tensorrt-rtx": BackendEntry("cuda", None, partial(_open_tensorrt, "tensorrt_rtx", GPU)),
    "tensorrt-fp8": BackendEntry("cuda", "fp8", partial(_open_tensorrt, "tensorrt", FP8)),
    "tensorrt-rtx-fp8": BackendEntry("cuda", "fp8", partial(_open_tensorrt, "tensorrt_rtx", FP8)),
}


def backend_entry(name: str) -> BackendEntry:
    """A backend's entry. Raises UsageError where there is no such backend."""
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


FASTEST = "fastest"
ON_CPU = [entry.precision for entry in BACKENDS.values() if entry.precision and entry.device == "cpu"]
PRECISIONS = (*dict.fromkeys(ON_CPU), FASTEST)


def check_precision(precision: str) -> None:
    """Raise UsageError where there is no such precision to ask for."""
    if precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")


def cpu_backends(precision: str = FASTEST) -> list[str]:
    """Backends that run on this machine's CPU in a precision of PRECISIONS, the most exact first.

    In FP32 that is the default alone, whose samples have the same bytes at any batch and beside any others. int8 has
    to be asked for: it changes the images.
    """
    here = chip_precisions()
    fits = lambda entry: entry.device == "cpu" and entry.precision in here and precision in (FASTEST, entry.precision)
    others = [name for name, entry in BACKENDS.items() if name != DEFAULT_BACKEND and fits(entry)]
    closest = [name for name in others if BACKENDS[name].precision != "int8"]
    return {"fp32": [DEFAULT_BACKEND], FASTEST: [DEFAULT_BACKEND, *closest]}.get(precision, others)


def open_backend(
    name: str,
    bundle: Bundle,
    *,
    threads: int | None = None,
    lanes: int = 1,
    replay: Replay = "step",
    device: int | None = None,
) -> Backend:
    """A backend, ready to run a bundle.

    Args:
        name: one of BACKENDS.
        threads, lanes: CPU threads in all and batches at once; a GPU chooses for itself.
        replay: what a GPU captures into CUDA graphs: "none", single steps, or the whole "loop".
        device: number of the GPU; None takes the one of this process's rank, see `choose_device`.

    Raises:
        UsageError: there is no such backend.
        BackendError: it is not installed, or finds no GPU.
    """
    return backend_entry(name).open(bundle, threads, lanes, replay, device)


class GpuElsewhere:
    """Stands for a backend on a GPU where only sizes are planned: Ray's driver may be on a node that has none.

    Args:
        name: one of BACKENDS.
    """

    lanes = DeviceBackend.lanes

    def __init__(self, name: str):
        self.name = name

    def default_batch(self, latent_cells: int) -> int:
        """See `Backend.default_batch`."""
        return default_batch(latent_cells, GPU_LATENT_CELLS)

    def memory(self, batch: int, size: tuple[int, int]) -> MemoryNeed | None:
        """See `Backend.memory`; the GPUs are elsewhere."""
        return None

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """See `Backend.run`; there is nothing that could run."""
        raise BackendError(f"{self.name} runs in Ray's workers; try a --dry-run without --ray, on a machine with a GPU")

    def submit(self, request: BatchRequest) -> Future[BatchResult]:
        """See `Backend.submit`; there is nothing that could run."""
        raise BackendError(f"{self.name} runs in Ray's workers; try a --dry-run without --ray, on a machine with a GPU")

    def close(self) -> None:
        """See `Backend.close`."""
