"""UNets in 8 bits, int8 for OpenVINO by NNCF and FP8 for TensorRT: ranges come from runs of the model itself."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

from grounded_diffusion.bundle import (
    FP8,
    GPU,
    INT8,
    OPENVINO,
    UNET,
    UNET_GROUNDED,
    Bundle,
    open_bundle,
    sha256,
    write_manifest,
)
from grounded_diffusion.engine import GroundedPipeline, Options, Prompt
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, OnnxRuntimeBackend
from grounded_diffusion.engine.backends.openvino_cpu import OpenVinoBackend, infer, load_openvino
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.rewrites.fp8 import SUFFIX, observed, to_fp8
from grounded_diffusion.export.rewrites.winograd import LARGEST

NAMES = ("dog", "cat", "car", "bus", "chair", "person", "horse", "bird")  # where a model does not say what it draws
CALLS = 24  # of a UNet, from whose activations the ranges are taken
SMOOTHED = 0.5  # share of an activation's outliers that convolutions take over into their weights


class Recorder(OpenVinoBackend):
    """A backend that keeps what its UNets are given."""

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        self.calls: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)

    def _infer(self, graph: str, request: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = infer(request, arrays)
        if graph in (UNET, UNET_GROUNDED):
            given = {value.get_any_name(): request.get_tensor(value.get_any_name()) for value in request.model_inputs}
            self.calls[graph].append({name: np.array(tensor.data) for name, tensor in given.items()})
        return outputs


def record_calls(recorder: Any) -> dict[str, list[dict[str, np.ndarray]]]:
    """Inputs of the UNets in some runs of the bundle's own sampler, guided throughout where it is guided at all.

    Args:
        recorder: a backend that keeps them in `calls`, by graph.
    """
    bundle, manifest = recorder.bundle, recorder.bundle.manifest
    small = max(manifest.image_size) <= LARGEST * manifest.vae_scale_factor
    images, runs = (8, 3) if small else (2, 1)
    names = [name for group in manifest.names.values() for name in group] or [*NAMES]
    with GroundedPipeline(bundle, recorder) as pipe:
        for run in range(runs):
            pairs = [
                (names[i % len(names)], names[(i + 1) % len(names)]) for i in range(run * images, (run + 1) * images)
            ]
            prompts = [Prompt(f"a photograph of a {a} and a {b}", tuple(dict.fromkeys((a, b)))) for a, b in pairs]
            list(pipe.generate(prompts, Options(seed=run, batch=images, guidance_interval=(0.0, 1.0))))
    even = lambda calls: [calls[int(i)] for i in np.linspace(0, len(calls) - 1, min(CALLS, len(calls)))]
    return {graph: even(calls) for graph, calls in recorder.calls.items()}


def quantize_bundle(path: str | Path, report: Callable[[str], None] = lambda line: None) -> None:
    """Add UNets in 8 bits to an exported FP32 bundle; those it has are made again.

    Weights and activations of convolutions and products have 8 bits, attention's scores and norms do not.

    Raises:
        UsageError: nncf is not installed, or the bundle is not of FP32.
        BundleError: there is no bundle.
        BackendError: openvino is not installed.
    """
    openvino, bundle = load_openvino(), open_bundle(path)
    if f"{OPENVINO}{UNET}" not in bundle.manifest.files:
        raise UsageError(f"{path} is of {bundle.manifest.precision}; int8 is made of a bundle of fp32")
    nncf = load_nncf()
    report("running the model for the ranges of its activations")
    calls, core = record_calls(Recorder(bundle)), openvino.Core()
    with TemporaryDirectory(dir=bundle.path, prefix=".int8-") as folder:
        for graph, given in calls.items():
            report(f"quantizing {graph} by {len(given)} of its calls")
            model = core.read_model(bundle.variant(OPENVINO, graph))
            model.reshape({name: list(array.shape) for name, array in given[0].items()})
            openvino.save_model(quantized(nncf, model, given), f"{folder}/{INT8}{Path(graph).stem}.xml", False)
        made = sorted(Path(folder).iterdir())
        for file in made:
            file.replace(bundle.file(file.name))
    files = bundle.manifest.files | {file.name: sha256(bundle.file(file.name)) for file in made}
    write_manifest(bundle.path, replace(bundle.manifest, files=files))


def quantized(nncf: Any, model: Any, calls: list[dict[str, np.ndarray]]) -> Any:
    """An OpenVINO model with 8 bits where NNCF sees a gain, outliers smoothed before."""
    smooth = nncf.AdvancedSmoothQuantParameters(matmul=0.95, convolution=SMOOTHED)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            model, nncf.Dataset(calls), subset_size=len(calls), preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
        )  # fmt: skip


def load_nncf() -> Any:
    """The `nncf` package, quiet. Raises UsageError where it is not installed."""
    try:
        nncf = importlib.import_module("nncf")
    except ImportError as error:
        raise UsageError(f"nncf cannot be imported ({error}); pip install 'grounded-diffusion[int8]'") from None
    nncf.set_log_level(logging.ERROR)
    return nncf


class OnnxRecorder(OnnxRuntimeBackend):
    """A backend that keeps what its UNets are given."""

    def __init__(self, bundle: Bundle):
        super().__init__(bundle, variant=GPU)
        self.calls: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    recorder, files = OnnxRecorder(bundle), {}
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
