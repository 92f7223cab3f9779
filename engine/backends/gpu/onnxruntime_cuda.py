"""ONNX Runtime's CUDA provider on the device loop: bound to its memory, on its streams, captured by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bundle import CONTEXT, CUDA, GPU, SHARED_ROWS, UNET_GROUNDED, VAE_DECODER, Bundle
from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError, Tensor
from grounded_diffusion.engine.backends.gpu.memory import Sizes, Streams
from grounded_diffusion.engine.backends.gpu.needs import counted_memory
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, WEIGHTS_FOLDER
from grounded_diffusion.engine.checks import first_line
from grounded_diffusion.engine.sampling.backend import Arrays
from grounded_diffusion.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'grounded-diffusion[cuda]'"
OPTIONS = {
    "prefer_nhwc": "1",  # tensor cores read channels last
    "fuse_conv_bias": "1",
    "use_tf32": "0",  # FP32 bundles are held to 1e-5
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "arena_extend_strategy": "kSameAsRequested",
    "do_copy_in_default_stream": "1",
}
NO_MEMORY = re.compile(r"out of memory|failed to allocate memory|alloc_failed", re.IGNORECASE)
NO_CAPTURE = "cannot use the graph capture"
SILENT = 4  # fatal errors alone: what fails is raised, and told once
# Bits of ONNX Runtime's AttentionBackend. First whatever the provider chooses; where cuDNN refuses a head size, such as
# the 160 of Stable Diffusion's innermost level, flash, memory-efficient and plain attention.
ATTENTION, WITHOUT_CUDNN = "0", str(1 | 2 | 16)
REFUSED_ATTENTION = re.compile(r"cudnn.*(attention|sdpa)|(attention|sdpa).*cudnn", re.IGNORECASE | re.DOTALL)


class OnnxRuntimeCuda:
    """A bundle's graphs as CUDA sessions; those of `cuda/` in the bundle where it has them.

    Args:
        device: a CudaDevice.

    Raises:
        BackendError: onnxruntime-gpu is not installed.
    """

    name = "cuda"

    def __init__(self, bundle: Bundle, device: Any):
        self.bundle, self.device = bundle, device
        self.ort = load_runtime()
        self.attention = ATTENTION
        self.ids = itertools.count(1)  # of captured graphs
        self._single: dict[str, Any] = {}

    def buckets(self, batch: int, objects: int, size: tuple[int, int]) -> None:
        """See `GraphRuntime.buckets`: any."""
        return None

    @property
    def prefix(self) -> str:
        """Of the graphs that run: those of the provider's own operators, where the bundle has them."""
        return CUDA if f"{CUDA}{CONTEXT}" in self.bundle.manifest.files else GPU

    def file(self, graph: str) -> Path:
        """The ONNX file of a graph."""
        return self.bundle.variant(self.prefix, graph)

    def memory(self, sizes: Sizes) -> int | None:
        """See `GraphRuntime.memory`."""
        return counted_memory(self.bundle, self.prefix, sizes)

    def session(self, graph: str, stream: Any, dims: Mapping[str, int] | None = None) -> Any:
        """A session on a stream.

        With all its free axes given, a graph has no shape arithmetic left, which would run on the CPU and keep it from
        being captured.

        Raises:
            BackendError, DeviceMemoryError.
        """
        options = OPTIONS | {
            "device_id": str(self.device.number),
            "sdpa_kernel": self.attention,
            "user_compute_stream": str(int(stream.handle)),
        }
        if not dims:
            return self._open(graph, options, {})
        try:
            return self._open(graph, options | {"enable_cuda_graph": "1"}, dims)
        except BackendError as error:
            if NO_CAPTURE not in str(error):
                raise
            return self._open(graph, options, dims)

    def _open(self, graph: str, options: dict[str, str], dims: Mapping[str, int]) -> Any:
        file, settings = self.file(graph), self.ort.SessionOptions()
        settings.log_severity_level = SILENT
        # A pattern sets aside all that a run ever needs, at offsets of its own, where the arena would use memory again.
        settings.enable_mem_pattern = False
        # The files of weights are named relative to the bundle, in its folder of variants too.
        settings.add_session_config_entry(WEIGHTS_FOLDER, str(self.bundle.path))
        settings.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        for axis, size in dims.items():
            settings.add_free_dimension_override_by_name(axis, size)
        try:
            session = self.ort.InferenceSession(
                file.read_bytes(),
                settings,
                providers=[(PROVIDER, options)],
                enable_fallback=0,  # it would print, and go on without the GPU
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise failure(f"onnxruntime cannot load {file} on {self.device.name}", error) from None
        if PROVIDER not in session.get_providers():
            raise BackendError(
                f"onnxruntime cannot start its CUDA provider on {self.device.name}: it needs CUDA 13 and cuDNN 9; "
                "pip install 'grounded-diffusion[cuda]'"
            )
        return session

    def run_options(self) -> Any:
        """Options of runs that are captured together; the device loop has events of its own, so nothing waits."""
        options = self.ort.RunOptions()
        options.log_severity_level = SILENT
        options.add_run_config_entry("gpu_graph_id", str(next(self.ids)))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def open(self, sizes: Sizes, streams: Streams) -> OnnxRuntimeGraphs:
        """See `GraphRuntime.open`."""
        return OnnxRuntimeGraphs(self, sizes, streams)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], streams: Streams) -> Arrays:
        """See `GraphRuntime.run`."""
        if graph not in self._single:
            self._single[graph] = self.session(graph, streams.aside)
        session = self._single[graph]
        given = {v.name: np.ascontiguousarray(inputs[v.name], DTYPES[v.type]) for v in session.get_inputs()}
        names = list(self.bundle.gpu_io(graph)[1])
        try:
            outputs = session.run(names, given)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise failure(f"onnxruntime failed in {graph} on {shapes}", error) from None
        return {name: value.astype(np.float32) for name, value in zip(names, outputs, strict=True)}

    def close(self) -> None:
        """See `GraphRuntime.close`."""
        self._single.clear()


class OnnxRuntimeGraphs:
    """See `Graphs`: the sessions of one bucket."""

    capturable = False  # ONNX Runtime captures by itself, once for each binding

    def __init__(self, runtime: OnnxRuntimeCuda, sizes: Sizes, streams: Streams):
        self.runtime, self.bundle, self.sizes, self.streams = runtime, runtime.bundle, sizes, streams
        self._sessions: dict[tuple[str, int], Any] = {}  # by graph and rows of context

    def session(self, graph: str, rows: int | None = None) -> Any:
        """A graph's session for `rows` rows of context; None takes those of guidance."""
        s = self.sizes
        rows = rows or 2 * s.batch
        if (graph, rows) not in self._sessions:
            stream = self.streams.decode if graph == VAE_DECODER else self.streams.loop
            batch = s.decoded if graph == VAE_DECODER else s.batch
            dims = {"B": batch, SHARED_ROWS: batch, "N": rows, "O": s.objects, "h": s.latent[1], "w": s.latent[2]}
            self._sessions[graph, rows] = self.runtime.session(graph, stream, dims)
        return self._sessions[graph, rows]

    def dtype(self, graph: str, tensor: str) -> np.dtype:
        """See `Graphs.dtype`."""
        session = self.session(graph)
        types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
        return np.dtype(DTYPES[types[tensor]])

    def mask_size(self) -> tuple[int, int]:
        """See `Graphs.mask_size`."""
        (shape,) = (v.shape for v in self.session(UNET_GROUNDED).get_outputs() if v.name == "mask_logits")
        return tuple(shape[2:])

    def bind(self, graph: str, tensors: Mapping[str, Tensor], stream: Any) -> Callable[[], None]:
        """See `Graphs.bind`. `stream` is the one that the graph's session is on."""
        rows = next((tensor.shape[0] for name, tensor in tensors.items() if name.startswith("context")), None)
        runtime, session = self.runtime, self.session(graph, rows)
        binding, options = session.io_binding(), runtime.run_options()
        for names, bind in zip(self.bundle.gpu_io(graph), (binding.bind_input, binding.bind_output), strict=True):
            for name in names:
                tensor = tensors[name]
                bind(name, "cuda", runtime.device.number, tensor.dtype.type, list(tensor.shape), tensor.pointer)

        def launch() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise failure(f"onnxruntime failed in {graph} at batch {self.sizes.batch}", error) from None

        try:
            with runtime.device.lock:  # it captures so that any wait of another thread would break the graph
                launch()  # runs once, then captures
        except BackendError as error:
            if runtime.attention == WITHOUT_CUDNN or not REFUSED_ATTENTION.search(str(error)):
                raise
            runtime.attention = WITHOUT_CUDNN
            self._sessions.clear()
            return self.bind(graph, tensors, stream)
        done = runtime.device.event()
        runtime.device.record(done, stream)
        runtime.device.sync(done)
        return launch

    def close(self) -> None:
        """See `Graphs.close`."""
        self._sessions.clear()


def load_runtime() -> Any:
    """The module onnxruntime with its CUDA provider and, where they come from pip, CUDA's libraries.

    Raises:
        BackendError: it is not installed, or has no CUDA provider.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({error}); pip install 'grounded-diffusion[cuda]'"
        ) from None
    if PROVIDER not in onnxruntime.get_available_providers():
        raise BackendError(
            f"the onnxruntime {onnxruntime.__version__} that is installed has no CUDA provider; {INSTALL}"
        )
    onnxruntime.set_default_logger_severity(SILENT)  # it warns of devices that it does not know by a plugin
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, which may be elsewhere
        onnxruntime.preload_dlls()
    return onnxruntime


def failure(what: str, error: Exception) -> BackendError:
    """An error of one line; of its own kind where the device's memory is full."""
    kind = DeviceMemoryError if NO_MEMORY.search(str(error)) else BackendError
    return kind(f"{what}: {first_line(error)}")
