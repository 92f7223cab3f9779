"""Where an FP16 bundle leaves FP32: `python -m grounded_diffusion.export.drift bundle`.

Every graph runs on ONNX Runtime with all its inner values marked as outputs, next to its FP32 twin: the same graph and
weights with all types widened. The first layer that is not finite, and the first one beyond a bound, are named by the
weights they use. The inputs are those that the engine's own loop gives the graphs, run on the twin.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime

from grounded_diffusion.bundle import (
    GRAPHS,
    TOKENIZER,
    UNET,
    UNET_GROUNDED,
    Bundle,
    open_bundle,
    sha256,
    write_manifest,
)
from grounded_diffusion.engine import GroundedPipeline, Prompt
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, WEIGHTS_FOLDER, OnnxRuntimeBackend
from grounded_diffusion.engine.sampling.backend import both_halves
from grounded_diffusion.errors import GroundedDiffusionError, UsageError
from grounded_diffusion.export.weights import WeightStore

MODULE = "python -m grounded_diffusion.export.drift"
BOUND = 2e-2  # relative L2; forty roundings to FP16 in a row, all one way
MARKED = 250  # values read in one run; at 512x512 a value is about 10 MB
FLOAT, HALF = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16
FALLBACK_NAMES = ["dog", "cat"]

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Layer:
    """One inner value of a graph, in FP16 against FP32; the worst of all runs.

    Attributes:
        name: of the value in both graphs.
        op: the operator that makes it.
        where: the weights it uses, or those last used before it.
        peak: largest magnitude in FP32.
        error: relative L2 of the FP16 value; infinite where it is not finite and the FP32 one is.
    """

    name: str
    op: str
    where: str
    peak: float
    error: float


def widen(bundle: Bundle, folder: Path) -> Bundle:
    """The FP32 twin of an FP16 bundle, written to `folder`: the same weights and graphs, no value of FP16."""
    store = WeightStore(folder)
    for graph in GRAPHS:
        model = onnx_ir.load(bundle.file(graph))
        for value in model.graph.initializers.values():
            if value.dtype == HALF:
                value.const_value = onnx_ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                value.dtype = FLOAT
        for value in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs)):
            value.dtype = FLOAT if value.dtype == HALF else value.dtype
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
                node.attributes["to"] = onnx_ir.AttrInt64("to", FLOAT)
        store.move(model)
        onnx_ir.save(model, folder / graph)
    (folder / TOKENIZER).write_bytes(bundle.file(TOKENIZER).read_bytes())
    files = {name: sha256(folder / name) for name in (*GRAPHS, TOKENIZER, *store.files)}
    write_manifest(folder, replace(bundle.manifest, precision="fp32", files=files))
    return open_bundle(folder)


class Recorder(OnnxRuntimeBackend):
    """A backend that keeps the inputs of every graph's first, middle and last calls."""

    def __init__(self, bundle: Bundle, steps: int):
        super().__init__(bundle)
        self.kept = {0, steps // 2, steps - 2}  # the plain UNet runs at all steps but the captured one
        self.calls: dict[str, list[Inputs]] = {graph: [] for graph in GRAPHS}
        self.counts = dict.fromkeys(GRAPHS, 0)

    def run(self, graph: str, inputs: Inputs) -> dict[str, np.ndarray]:
        if self.counts[graph] in self.kept:
            given = both_halves(inputs) if graph in (UNET, UNET_GROUNDED) else inputs
            self.calls[graph].append({name: np.array(value) for name, value in given.items()})
        self.counts[graph] += 1
        return super().run(graph, inputs)


def typical_inputs(bundle: Bundle, steps: int = 10) -> dict[str, list[Inputs]]:
    """What the engine's loop gives every graph: one image of two of the model's names, guided."""
    names = tuple([*(name for group in bundle.manifest.names.values() for name in group), *FALLBACK_NAMES][:2])
    recorder = Recorder(bundle, steps)
    prompt = Prompt(f"a photograph of a {names[0]} and a {names[1]}", names)
    list(GroundedPipeline(bundle, recorder).generate([prompt], seed=0, steps=steps))
    return recorder.calls


def marked(bundle: Bundle, graph: str, inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
    """Every floating-point value that a graph's nodes make, by name, each rounded to its own type."""
    model = onnx_ir.load(bundle.file(graph))
    values = [v for node in model.graph for v in node.outputs if v.dtype in (FLOAT, HALF)]
    outputs, options = list(model.graph.outputs), onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(bundle.path))
    for start in range(0, len(values), MARKED):
        part = values[start : start + MARKED]
        model.graph.outputs[:] = [*outputs, *(value for value in part if value not in outputs)]
        content = onnx_ir.serde.serialize_model(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        feeds = {i.name: inputs[i.name].astype(DTYPES[i.type]) for i in session.get_inputs()}
        names = [value.name for value in part]
        yield from zip(names, session.run(names, feeds), strict=True)


def where(graph: onnx_ir.Graph) -> dict[str, str]:
    """Value name -> the module whose weights make it, or made what it is made of."""
    known: dict[str, str] = {}
    for node in graph:
        weights = [v.name.removesuffix(".half") for v in node.inputs if v is not None and v.is_initializer()]
        modules = [name.rpartition(".")[0] for name in weights if "." in name]
        before = [known[v.name] for v in node.inputs if v is not None and v.name in known]
        known |= dict.fromkeys((v.name for v in node.outputs), next(iter([*modules, *before]), graph.inputs[0].name))
    return known


def compare(bundle: Bundle, twin: Bundle, graph: str, calls: Sequence[Inputs]) -> list[Layer]:
    """Every layer of a graph in the order it runs, FP16 against FP32."""
    model = onnx_ir.load(bundle.file(graph))
    place, ops = where(model.graph), {v.name: node.op_type for node in model.graph for v in node.outputs}
    layers: dict[str, Layer] = {}
    for inputs in calls:
        with np.errstate(all="ignore"):
            for (name, actual), (_, expected) in zip(
                marked(bundle, graph, inputs), marked(twin, graph, inputs), strict=True
            ):
                wide = expected.astype(np.float64)
                error = np.linalg.norm(actual - wide) / max(np.linalg.norm(wide), 1e-30)
                error = float(error) if np.isfinite(error) else np.inf if np.isfinite(wide).all() else 0.0
                peak, old = float(np.abs(wide).max(initial=0)), layers.get(name)
                if old is None or error > old.error:
                    layers[name] = Layer(name, ops[name], place[name], peak, error)
    return list(layers.values())


def report(graph: str, layers: Sequence[Layer], bound: float) -> list[str]:
    """A graph's table: the first layer that is not finite, the first beyond the bound, the worst and the outputs."""
    marks = [("first not finite", next((i for i, x in enumerate(layers) if np.isinf(x.error)), None))]
    marks += [("first drift", next((i for i, x in enumerate(layers) if bound < x.error < np.inf), None))]
    finite = [i for i, x in enumerate(layers) if x.error < np.inf]
    marks += [("worst", max(finite, key=lambda i: layers[i].error, default=None)), ("last", len(layers) - 1)]
    lines = [f"{graph}: {len(layers)} layers, {sum(x.error > bound for x in layers)} beyond {bound:g}"]
    for mark, i in marks:
        if i is not None:
            x = layers[i]
            lines.append(f"  {mark:16} {i:5} {x.op:22} peak {x.peak:9.4g}  error {x.error:9.2e}  {x.where} ({x.name})")
        elif mark.startswith("first"):
            lines.append(f"  {mark:16} none")
    return lines


def drift(bundle: Bundle, graphs: Sequence[str] = GRAPHS) -> Iterator[tuple[str, list[Layer]]]:
    """Every graph's layers. Raises UsageError for a bundle that is not of FP16."""
    if bundle.manifest.precision != "fp16":
        raise UsageError(f"{bundle.path} is of {bundle.manifest.precision}; drift is that of an fp16 bundle")
    with tempfile.TemporaryDirectory(prefix="gd-drift-") as folder:
        twin = widen(bundle, Path(folder))
        calls = typical_inputs(twin)
        for graph in graphs:
            yield graph, compare(bundle, twin, graph, calls[graph])


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 when a layer is not finite in FP16 alone."""
    parser = argparse.ArgumentParser(
        MODULE, description="The first NaN and the first drift of an FP16 bundle's layers."
    )
    parser.add_argument("bundle", type=Path, help="a bundle made by gd-export --precision fp16")
    parser.add_argument("--graph", choices=GRAPHS, action="append", help="only this graph; may be repeated")
    parser.add_argument("--bound", type=float, default=BOUND, help=f"relative L2 that counts as drift ({BOUND:g})")
    parser.add_argument("--all", action="store_true", help="list every layer")
    args, broken = parser.parse_args(argv), False
    try:
        for graph, layers in drift(open_bundle(args.bundle), args.graph or GRAPHS):
            print("\n".join(report(graph, layers, args.bound)))
            for i, x in enumerate(layers if args.all else ()):
                print(f"  {i:5} {x.op:22} {x.peak:9.4g} {x.error:9.2e}  {x.where} ({x.name})")
            broken |= any(np.isinf(x.error) for x in layers)
    except GroundedDiffusionError as error:
        print(f"drift: {error}", file=sys.stderr)
        return error.exit_code
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
