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

from grounded_diffusion.bundle import GRAPH_IO, TEXT_ENCODER, UNET_GROUNDED, VAE_DECODER, Bundle
from grounded_diffusion.engine.backend import Arrays
from grounded_diffusion.engine.device import DeviceMemoryError, Tensor
from grounded_diffusion.engine.device_memory import Sizes, Streams
from grounded_diffusion.engine.onnxruntime_backend import DTYPES, first_line
from grounded_diffusion.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall onnxruntime, then pip install 'grounded-diffusion[cuda]'"
VARIANT = "cuda"  # folder of a bundle with graphs fused for this provider
OPTIONS = {
    "prefer_nhwc": "1",  # tensor cores read channels last
    "fuse_conv_bias": "1",
    "use_tf32": "0",  # FP32 bundles are held to 1e-5
    "sdpa_kernel": "0",  # the provider chooses: flash attention where the sizes allow it
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "cudnn_conv_use_max_workspace": "1",
    "arena_extend_strategy": "kSameAsRequested",
    "do_copy_in_default_stream": "1",
}
NO_MEMORY = re.compile(r"out of memory|failed to allocate memory|alloc_failed", re.IGNORECASE)
NO_CAPTURE = "cannot use the graph capture"


class OnnxRuntimeCudaNetworks:
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
        self.ids = itertools.count(1)  # of captured graphs
        self._sessions: dict[str, Any] = {}

    def buckets(self, batch: int, objects: int, size: tuple[int, int]) -> None:
        """See `Networks.buckets`: any."""
        return None

    def file(self, graph: str) -> Path:
        """The ONNX file of a graph: the variant for this provider, if there is one."""
        fused = self.bundle.path / VARIANT / graph
        return fused if fused.is_file() else self.bundle.file(graph)

    def session(self, graph: str, streams: Streams) -> Any:
        """A graph's session on the stream it runs on, opened now if it was not. Raises BackendError."""
        if graph not in self._sessions:
            stream = {TEXT_ENCODER: streams.aside, VAE_DECODER: streams.decode}.get(graph, streams.loop)
            options = OPTIONS | {"device_id": "0", "user_compute_stream": str(int(stream.handle))}
            try:
                session = self._open(graph, options | {"enable_cuda_graph": "1"})
            except BackendError as error:
                if NO_CAPTURE not in str(error):
                    raise
                session = self._open(graph, options)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _open(self, graph: str, options: dict[str, str]) -> Any:
        file, settings = self.file(graph), self.ort.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            session = self.ort.InferenceSession(str(file), settings, providers=[(PROVIDER, options)])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise failure(f"onnxruntime cannot load {file} on {self.device.name}", error) from None
        if PROVIDER not in session.get_providers():
            raise BackendError(
                f"onnxruntime cannot start its CUDA provider on {self.device.name}: it needs CUDA 13 and cuDNN 9; "
                "pip install 'grounded-diffusion[cuda]'"
            )
        return session

    def run_options(self, number: int) -> Any:
        """Options of a run that is captured under a number, or not at all (-1)."""
        options = self.ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        if number >= 0:  # the device loop has events of its own
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def open(self, sizes: Sizes, streams: Streams) -> Sessions:
        """See `Networks.open`."""
        return Sessions(self, sizes, streams)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], streams: Streams) -> Arrays:
        """See `Networks.run`."""
        session = self.session(graph, streams)
        given = {v.name: np.ascontiguousarray(inputs[v.name], DTYPES[v.type]) for v in session.get_inputs()}
        names = list(GRAPH_IO[graph][1])
        try:
            outputs = session.run(names, given, self.run_options(-1))
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise failure(f"onnxruntime failed in {graph} on {shapes}", error) from None
        return {name: value.astype(np.float32) for name, value in zip(names, outputs, strict=True)}


class Sessions:
    """See `Graphs`: one bucket's bindings to the sessions."""

    capturable = False  # ONNX Runtime captures by itself, once for each binding

    def __init__(self, networks: OnnxRuntimeCudaNetworks, sizes: Sizes, streams: Streams):
        self.networks, self.sizes, self.streams = networks, sizes, streams

    def dtype(self, graph: str, tensor: str) -> np.dtype:
        """See `Graphs.dtype`."""
        session = self.networks.session(graph, self.streams)
        types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
        return np.dtype(DTYPES[types[tensor]])

    def mask_size(self) -> tuple[int, int]:
        """See `Graphs.mask_size`: as a run of one image gives it."""
        s = self.sizes
        inputs = {
            "latents": np.zeros((2, *s.latent)),
            "timestep": np.zeros(2),
            "context": np.zeros((2, s.tokens, s.width)),
            "queries": np.zeros((1, s.objects, s.width)),
            "query_valid": np.ones((1, s.objects)),
        }
        return self.networks.run(UNET_GROUNDED, inputs, self.streams)["mask_logits"].shape[2:]

    def bind(self, graph: str, tensors: Mapping[str, Tensor], stream: Any) -> Callable[[], None]:
        """See `Graphs.bind`. `stream` is the one that the graph's session was opened on."""
        networks = self.networks
        session = networks.session(graph, self.streams)
        binding, options = session.io_binding(), networks.run_options(next(networks.ids))
        for names, bind in zip(GRAPH_IO[graph], (binding.bind_input, binding.bind_output), strict=True):
            for name in names:
                tensor = tensors[name]
                bind(name, "cuda", 0, tensor.dtype.type, list(tensor.shape), tensor.pointer)

        def launch() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except Exception as error:
                raise failure(f"onnxruntime failed in {graph} at batch {self.sizes.batch}", error) from None

        launch()  # runs once, then captures
        done = networks.device.event()
        networks.device.record(done, stream)
        networks.device.sync(done)
        return launch

    def close(self) -> None:
        """See `Graphs.close`; the sessions stay for other buckets."""


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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, which may be elsewhere
        onnxruntime.preload_dlls()
    return onnxruntime


def failure(what: str, error: Exception) -> BackendError:
    """An error of one line; of its own kind where the device's memory is full."""
    kind = DeviceMemoryError if NO_MEMORY.search(str(error)) else BackendError
    return kind(f"{what}: {first_line(error)}")
