"""ONNX Runtime on the CPU: sessions opened at first use, inputs and outputs bound without copies."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bundle import CPU, GRAPH_IO, MAKERS, OPTIONAL_OUTPUTS, SHARED_ROWS, Bundle
from grounded_diffusion.engine.backends.host import HostBackend
from grounded_diffusion.engine.checks import first_line, usable_cores
from grounded_diffusion.engine.sampling.backend import Arrays, both_halves
from grounded_diffusion.errors import BackendError

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # option: where a graph's weight files lie
REMEMBERED = 8  # sets of output buffers a graph keeps, one per input shape


class Maker:
    """What a UNet takes in the place of one of its inputs, of which it is a function: made where that has changed.

    Keys and values of cross-attention are functions of the context alone.
    """

    def __init__(self, session: Any):
        self.session = session
        self.source = session.get_inputs()[0]
        self.outputs = [value.name for value in session.get_outputs()]
        self._own = threading.local()  # .given, and .made of it

    def __call__(self, given: np.ndarray) -> Arrays:
        if isinstance(self.source.shape[0], int):  # what all rows have in common
            given = given[: self.source.shape[0]]
        known = getattr(self._own, "given", None)
        if known is None or not np.array_equal(known, given):
            typed = np.ascontiguousarray(given, DTYPES[self.source.type])
            made = self.session.run(self.outputs, {self.source.name: typed})
            self._own.given, self._own.made = given.copy(), dict(zip(self.outputs, made, strict=True))
        return self._own.made


class Graph:
    """One session, with output buffers of every calling thread reused as long as the input shapes stay the same.

    Args:
        makers: by name of the input that they stand for.
    """

    def __init__(self, name: str, session: Any, makers: Mapping[str, Maker]):
        self.name, self.session, self.makers = name, session, makers
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        names_in, names_out = GRAPH_IO[name]
        required = set(self.outputs) - OPTIONAL_OUTPUTS.get(name, {}).keys()
        names_in = names_in.keys() - makers.keys() | {name for maker in makers.values() for name in maker.outputs}
        if set(self.inputs) != set(names_in) or required != set(names_out):
            raise BackendError(
                f"{name} has inputs {sorted(self.inputs)} and outputs {sorted(self.outputs)}, "
                f"not those of the bundle format; run gd-export again"
            )
        self.repeats = "context" in GRAPH_IO[name][0] and self.inputs["latents"].shape[0] != SHARED_ROWS
        self._own = threading.local()  # .binding, and .buffers: outputs by the shapes of the inputs

    def _convert(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Inputs in the types the graph wants, contiguous. Raises BackendError for names and shapes that do not fit."""
        if set(inputs) != set(self.inputs):
            raise BackendError(f"{self.name} takes {sorted(self.inputs)}, not {sorted(inputs)}")
        arrays = {}
        for name, value in inputs.items():
            wanted = self.inputs[name]
            fixed = [size if isinstance(size, int) else None for size in wanted.shape]
            if len(fixed) != value.ndim or any(f not in (None, n) for f, n in zip(fixed, value.shape, strict=True)):
                raise BackendError(
                    f"{self.name} was exported for {name} of shape {wanted.shape}, not {list(value.shape)}; "
                    "use the bundle's own size, or export it for this one"
                )
            arrays[name] = np.ascontiguousarray(value, DTYPES[wanted.type])
        return arrays

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        if self.repeats:
            inputs = both_halves(inputs)
        for name in self.makers.keys() & inputs.keys():
            others = {other: value for other, value in inputs.items() if other != name}
            inputs = others | self.makers[name](inputs[name])
        arrays = self._convert(inputs)
        key = tuple(array.shape for array in arrays.values())
        if not hasattr(self._own, "binding"):
            self._own.binding, self._own.buffers = self.session.io_binding(), {}
        binding, known = self._own.binding, self._own.buffers
        if key not in known:  # the first run of a shape tells the shapes of the outputs
            outputs = self.session.run(self.outputs, arrays)
            if len(known) == REMEMBERED:
                known.pop(next(iter(known)))
            known[key] = {name: np.ascontiguousarray(v) for name, v in zip(self.outputs, outputs, strict=True)}
        else:
            for name, array in arrays.items():
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, array in known[key].items():
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self.session.run_with_iobinding(binding)
        return {name: array.astype(np.float32, copy=False) for name, array in known[key].items()}


class OnnxRuntimeBackend(HostBackend):
    """The `onnxruntime` package with its CPU provider.

    Args:
        bundle: the opened bundle.
        threads: CPU threads in all; None takes all cores this process may use.
        lanes: batches at once; each has its share of the threads.
        sessions: graphs kept open at once; opening one more closes the oldest.
        variant: of the graphs, see bundle.CPU; those in standard operators can be checked here.

    Raises:
        BackendError: onnxruntime is not installed.
    """

    name = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None, lanes: int = 1, sessions: int = len(GRAPH_IO),
                 variant: str = CPU):  # fmt: skip
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                f"onnxruntime cannot be imported ({error}); pip install 'grounded-diffusion[cpu]'"
            ) from None
        self.bundle, self.sessions, self.variant, self._ort = bundle, sessions, variant, onnxruntime
        super().__init__(lanes)
        self._graphs: dict[str, Graph] = {}
        self._shared: dict[str, Maker] = {}
        self._opening = threading.Lock()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, (threads or usable_cores()) // lanes)
        options.inter_op_num_threads = 1  # the graphs are chains; one operation at a time has all threads
        options.enable_cpu_mem_arena = True
        options.enable_mem_pattern = True
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3  # errors; warnings there are about the library's own decisions
        options.add_session_config_entry(WEIGHTS_FOLDER, str(bundle.path))
        self._options = options

    def graph(self, name: str) -> Graph:
        """A graph's session, opened now if it was not. Raises BackendError."""
        with self._opening:
            if name not in self._graphs:
                while len(self._graphs) >= self.sessions:
                    self._graphs.pop(next(iter(self._graphs)))
                session = self._session(self.bundle.variant(self.variant, name))
                self._graphs[name] = Graph(name, session, self._makers() if "context" in GRAPH_IO[name][0] else {})
            return self._graphs[name]

    def _session(self, path: Path) -> Any:
        try:
            return self._ort.InferenceSession(self._model(path), self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"onnxruntime cannot load {path}: {first_line(error)}") from None

    def _model(self, path: Path) -> bytes:
        return path.read_bytes()

    def _makers(self) -> dict[str, Maker]:
        """Shared by the UNets; a captured step has the context of the steps before it."""
        for source, graph in MAKERS.items():
            if source not in self._shared and (file := self.bundle.variant(self.variant, graph)).is_file():
                self._shared[source] = Maker(self._session(file))
        return self._shared

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """See `Backend.run`."""
        loaded = self.graph(graph)
        try:
            return loaded.run(inputs)
        except BackendError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise BackendError(f"onnxruntime failed in {graph} on {shapes}: {first_line(error)}") from None
