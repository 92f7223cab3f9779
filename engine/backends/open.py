"""Backends by name."""

from __future__ import annotations

from grounded_diffusion.bundle import Bundle
from grounded_diffusion.engine.backends.gpu.loop import Replay
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.errors import UsageError

BACKENDS = ("onnxruntime", "cuda", "tensorrt", "tensorrt-rtx")


def open_backend(
    name: str, bundle: Bundle, *, threads: int | None = None, lanes: int = 1, replay: Replay = "step"
) -> Backend:
    """A backend, ready to run a bundle.

    Args:
        name: "onnxruntime" runs on the CPU; "cuda" is ONNX Runtime on an NVIDIA GPU; "tensorrt" and "tensorrt-rtx" run
            engines that `gd-export --engine` has built.
        threads, lanes: CPU threads in all and batches at once; a GPU chooses for itself.
        replay: what a GPU captures into CUDA graphs: "none", single steps, or the whole "loop".

    Raises:
        UsageError: there is no such backend.
        BackendError: it is not installed, or finds no GPU.
    """
    if name not in BACKENDS:
        raise UsageError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "onnxruntime":
        from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, threads, lanes)
    from grounded_diffusion.engine.backends.gpu.backend import DeviceBackend

    if name == "cuda":
        from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice
        from grounded_diffusion.engine.backends.gpu.onnxruntime_cuda import OnnxRuntimeCudaNetworks, load_runtime

        load_runtime()  # what is missing is said in the order in which it is installed
        device = CudaDevice()
        return DeviceBackend(bundle, device, OnnxRuntimeCudaNetworks(bundle, device), replay)
    from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice
    from grounded_diffusion.engine.backends.gpu.tensorrt import TensorRTNetworks
    from grounded_diffusion.engine.backends.tensorrt.spec import load_module

    package = name.replace("-", "_")
    load_module(package)
    device = CudaDevice()
    return DeviceBackend(bundle, device, TensorRTNetworks(bundle, package, device), replay)
