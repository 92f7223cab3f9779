"""UNets in FP8 for TensorRT, from an FP16 bundle: ranges of the activations come from runs of the model itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime

from grounded_diffusion.bundle import FP8, GPU, UNET, UNET_GROUNDED, Bundle, open_bundle, sha256, write_manifest
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, OnnxRuntimeBackend
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.quantize import record_calls
from grounded_diffusion.export.rewrites.fp8 import SUFFIX, observed, to_fp8

Call = Mapping[str, np.ndarray]


class Recorder(OnnxRuntimeBackend):
    """A backend that keeps what its UNets are given."""

    def __init__(self, bundle: Bundle):
        super().__init__(bundle, variant=GPU)
        self.calls: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)

    def run(self, graph: str, inputs: Call) -> dict[str, np.ndarray]:
        if graph in (UNET, UNET_GROUNDED):
            self.calls[graph].append({name: np.array(value) for name, value in inputs.items()})
        return super().run(graph, inputs)

    def ranges(self, model: onnx_ir.Model, calls: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Largest magnitude of each value that the products of a UNet read in any of these calls, by name."""
        content = onnx_ir.to_proto(observed(model)).SerializeToString()
        session = onnxruntime.InferenceSession(content, self._options, providers=["CPUExecutionProvider"])
        names, largest = [value.name for value in session.get_outputs()], np.zeros(len(session.get_outputs()))
        for call in calls:
            given = call | self._makers()["context"](call["context"])
            inputs = {value.name: given[value.name].astype(DTYPES[value.type]) for value in session.get_inputs()}
            largest = np.maximum(largest, session.run(names, inputs))
        return {name.removesuffix(SUFFIX): float(value) for name, value in zip(names, largest, strict=True)}


def fp8_bundle(path: str | Path, report: Callable[[str], None] = lambda line: None) -> None:
    """Add UNets in FP8 to an exported FP16 bundle, unless it has them.

    Raises:
        UsageError: the bundle is not of FP16.
        BundleError: there is no bundle.
    """
    bundle = open_bundle(path)
    if bundle.manifest.precision != "fp16":
        raise UsageError(f"{path} is of {bundle.manifest.precision}; fp8 is made of a bundle of fp16")
    if f"{FP8}{UNET}" in bundle.manifest.files:
        return
    report("running the model for the ranges of its activations")
    recorder, files = Recorder(bundle), {}
    for graph, calls in record_calls(recorder).items():
        report(f"rounding {graph} to fp8 by {len(calls)} of its calls")
        model = onnx_ir.load(bundle.variant(GPU, graph))
        onnx_ir.external_data.set_base_dir(model.graph, bundle.path)
        to_fp8(model, recorder.ranges(model, calls))
        file = bundle.file(f"{FP8}{graph}")
        file.parent.mkdir(exist_ok=True)
        onnx_ir.save(model, file)
        files[f"{FP8}{graph}"] = sha256(file)
    write_manifest(bundle.path, replace(bundle.manifest, files=bundle.manifest.files | files))
