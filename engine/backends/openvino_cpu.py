"""OpenVINO on the CPU: a model compiled for every shape, kept on disk. In FP32, the chip's BF16, or UNets in 8 bits.

Shapes are static: OpenVINO then plans all memory beforehand and has no shape arithmetic left. So that not every size of
a last batch is compiled, sizes are rounded up, and the rows that this adds are cut off again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from grounded_diffusion.bundle import CONTEXT, GRAPH_IO, OPENVINO, PRESENCE, TEXT_ENCODER, TIME, UNET, Bundle
from grounded_diffusion.cache import cache_folder
from grounded_diffusion.engine.backends.host import HostBackend
from grounded_diffusion.engine.checks import first_line, usable_cores
from grounded_diffusion.engine.sampling.backend import Arrays, both_halves
from grounded_diffusion.errors import BackendError

PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}  # ours; and what OpenVINO keeps between layers
EXACT = (TEXT_ENCODER, TIME)  # always computed in FP32: they cost little, and everything depends on them
REMEMBERED = 16  # compiled shapes; one more closes the oldest
Shapes = dict[str, tuple[int, ...]]


def rounded(count: int) -> int:
    """The next size for which graphs are compiled: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., at most a half too many."""
    step = max(1, (1 << (count - 1).bit_length()) // 4)
    return -(-count // step) * step


def load_openvino() -> Any:
    """The `openvino` package, kept from sending its telemetry. Raises BackendError where it is not installed."""
    modules = cast(dict[str, Any], sys.modules)
    modules.setdefault("openvino_telemetry", None)  # cannot be imported then; openvino reports its own import by it
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"openvino cannot be imported ({error}); pip install 'grounded-diffusion[openvino]'"
        ) from None
    return openvino


def chip_precisions() -> tuple[str, ...]:
    """Precisions that OpenVINO computes in on this machine's chip, the most exact first; () without OpenVINO."""
    try:
        capabilities = load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except BackendError:
        return ()
    return tuple(name for name in PRECISIONS if name.upper() in capabilities)


class Compiled:
    """A graph compiled for one set of shapes, with a request of every calling thread."""

    def __init__(self, model: Any):
        self.model = model
        self.types = {value.get_any_name(): value.get_element_type() for value in model.inputs}
        self._own = threading.local()

    def request(self) -> Any:
        """The calling thread's request; its output tensors stay the same."""
        if not hasattr(self._own, "request"):
            self._own.request = self.model.create_infer_request()
        return self._own.request


class OpenVinoBackend(HostBackend):
    """The `openvino` package with its CPU plugin.

    Args:
        bundle: the opened bundle.
        threads: CPU threads in all; None takes all cores this process may use.
        lanes: batches at once; each is a stream with its share of the threads.
        precision: one of PRECISIONS, in which layers compute and hand on; inputs and outputs are float32.

    Raises:
        BackendError: openvino is not installed, or the chip does not have the precision.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, lanes: int = 1, precision: str = "fp32"):
        super().__init__(lanes)
        self.bundle, self.name, self._ov = bundle, f"openvino-{precision}", load_openvino()
        self._core = self._ov.Core()
        if precision.upper() not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError(f"this machine's CPU has no {precision} instructions; use --precision fp32")
        if precision == "int8" and bundle.int8(UNET) is None:
            raise BackendError(f"{bundle.path} has no UNets in int8; gd-export --bundle {bundle.path} --int8 adds them")
        self.precision, kept = precision, PRECISIONS[precision]
        if kept.upper() not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") and kept != "f32":
            kept = "f32"
        self._type = getattr(self._ov.Type, kept)
        self._settings = {
            "INFERENCE_PRECISION_HINT": kept,
            "NUM_STREAMS": lanes,
            "INFERENCE_NUM_THREADS": max(threads or usable_cores(), lanes),
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
            "CACHE_DIR": str(cache_folder() / "openvino"),
        }
        self._compiled: dict[tuple, Compiled] = {}
        self._opening = threading.Lock()
        self._own = threading.local()  # .contexts: number of rows -> (context, its request), see _keys_and_values

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """See `Backend.run`."""
        try:
            return self._run(graph, inputs)
        except BackendError:
            raise
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise BackendError(f"openvino failed in {graph} on {shapes}: {first_line(error)}") from None

    def _run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        if set(inputs) != set(GRAPH_IO[graph][0]):
            raise BackendError(f"{graph} takes {sorted(GRAPH_IO[graph][0])}, not {sorted(inputs)}")
        images = len(inputs.get("queries", next(iter(inputs.values()))))
        objects = inputs["queries"].shape[1] if "queries" in inputs else 0
        arrays = {name: padded(value, images, name in ("queries", "query_valid")) for name, value in inputs.items()}
        if "context" in arrays and f"{OPENVINO}{graph}" not in self.bundle.manifest.files:
            arrays = both_halves(arrays)
        made = self._made(arrays) if f"{OPENVINO}{graph}" in self.bundle.manifest.files else {}
        compiled = self._compile(graph, {name: a.shape for name, a in arrays.items()}, made)
        request = compiled.request()
        for name, tensor in made.items():
            request.set_tensor(name, tensor)
        outputs = self._infer(graph, request, {name: arrays[name] for name in arrays if name in compiled.types})
        rows = rounded(images)
        outputs = {name: cut(value, images, rows) for name, value in outputs.items()}
        if objects:
            for name in {"mask_logits", PRESENCE} & outputs.keys():
                outputs[name] = outputs[name][:, :objects]
        return outputs

    def _infer(self, graph: str, request: Any, arrays: Mapping[str, np.ndarray]) -> Arrays:
        return infer(request, arrays)

    def _made(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What the UNets take in the place of context and timestep, as OpenVINO's tensors of this thread."""
        if "context" not in arrays:
            return {}
        if not hasattr(self._own, "contexts"):
            self._own.contexts = {}
        context, timestep = arrays["context"], arrays["timestep"]
        if (timestep != timestep[0]).any():
            raise BackendError("openvino's UNets take one timestep for all rows")
        known = self._own.contexts.get(len(context))
        if known is None or not np.array_equal(known[0], context):
            request = self._compile(CONTEXT, {"context": context.shape}).request()
            infer(request, {"context": context})
            known = self._own.contexts[len(context)] = (context.copy(), request)
        time = self._compile(TIME, {"timestep": (1,)}).request()
        infer(time, {"timestep": timestep[:1]})
        return {
            value.get_any_name(): request.get_tensor(value.get_any_name())
            for request in (known[1], time)
            for value in request.model_outputs
        }

    def _compile(self, graph: str, shapes: Shapes, made: Mapping[str, Any] = {}) -> Compiled:
        """A graph for these shapes; `made` are inputs in this backend's own precision."""
        key = (graph, tuple(shapes.items()))
        with self._opening:
            if key not in self._compiled:
                while len(self._compiled) >= REMEMBERED:
                    self._compiled.pop(next(iter(self._compiled)))
                small = self.bundle.int8(graph) if self.precision == "int8" else None
                self._compiled[key] = self._open(small or self.bundle.variant(OPENVINO, graph), shapes, made)
            return self._compiled[key]

    def _open(self, path: Path, shapes: Shapes, made: Mapping[str, Any]) -> Compiled:
        try:
            model = self._core.read_model(path)
            all_shapes = shapes | {name: tuple(tensor.shape) for name, tensor in made.items()}
            names = [value.get_any_name() for value in model.inputs]
            model.reshape({name: list(all_shapes[name]) for name in names})
            types = self._ov.preprocess.PrePostProcessor(model)
            for name in made.keys() & set(names):
                types.input(name).tensor().set_element_type(self._type)
            if path.name in (f"{OPENVINO}{CONTEXT}", f"{OPENVINO}{TIME}"):
                for value in model.outputs:
                    types.output(value.get_any_name()).tensor().set_element_type(self._type)
            exact = {"INFERENCE_PRECISION_HINT": PRECISIONS["fp32"]} if path.name.endswith(EXACT) else {}
            return Compiled(self._core.compile_model(types.build(), "CPU", self._settings | exact))
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise BackendError(f"openvino cannot load {path}: {first_line(error)}") from None


def infer(request: Any, arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Run a request on these inputs; float outputs are views of its own buffers."""
    for name, array in arrays.items():
        request.get_tensor(name).data[...] = array
    request.start_async()  # in one of the streams
    request.wait()
    return {value.get_any_name(): request.get_tensor(value.get_any_name()).data for value in request.model_outputs}


def padded(array: np.ndarray, images: int, objects: bool) -> np.ndarray:
    """`array` [k * images, ...] with `images`, and the objects of its second axis, rounded up."""
    more = rounded(images) - images
    if objects:
        array = np.pad(array, [(0, 0), (0, rounded(array.shape[1]) - array.shape[1])] + [(0, 0)] * (array.ndim - 2))
    if not more:
        return array
    parts = array.reshape(-1, images, *array.shape[1:])
    return np.concatenate([parts, np.repeat(parts[:, -1:], more, 1)], 1).reshape(-1, *array.shape[1:])


def cut(array: np.ndarray, images: int, rows: int) -> np.ndarray:
    """The first `images` of every `rows` rows, of k * rows; what `padded` has added goes."""
    if images == rows:
        return array
    return array.reshape(-1, rows, *array.shape[1:])[:, :images].reshape(-1, *array.shape[1:])
