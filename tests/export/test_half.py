"""FP16 bundles: types, islands, parity, and the tool that finds the layer which leaves FP32."""

import numpy as np
import onnx
import onnx_ir
import pytest
from helpers.errors import relative_l2
from helpers.half import to_half_bundle

from grounded_diffusion.bundle import (
    GRAPH_IO,
    GRAPHS,
    TEXT_ENCODER,
    UNET,
    UNET_GROUNDED,
    VAE_DECODER,
    open_bundle,
)
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export import cli, drift
from grounded_diffusion.export.bundle import export_bundle
from grounded_diffusion.export.graphs import trace
from grounded_diffusion.export.rewrites.half import FLOAT_VALUES, ISLANDS
from grounded_diffusion.export.verify import check_graphs, check_loop
from grounded_diffusion.training.checkpoint import load_checkpoint

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@pytest.mark.slow
def test_gd_export_in_fp16(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert cli.main(["--ckpt", str(tiny_checkpoint), "--out", str(out), "--precision", "fp16", "--fused"]) == 0
    said = capsys.readouterr().out
    assert open_bundle(out).manifest.precision == "fp16" and "FAILED" not in said
    assert all(f"cuda/{graph} " in said for graph in (UNET, UNET_GROUNDED, VAE_DECODER))


def test_fused_graphs_are_of_fp16(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "bundle"
    assert cli.main(["--ckpt", str(tiny_checkpoint), "--out", str(out), "--fused"]) == 2
    assert "--fused needs --precision fp16" in capsys.readouterr().err
    with pytest.raises(UsageError, match="give --precision fp16 with --fused"):
        export_bundle(None, out, fused=True)
    assert not out.exists()


def test_a_trace_in_fp16(tiny_checkpoint):
    """What the exporter writes: the decoder's norms are single nodes there, not sums of rows as FP32 needs."""
    model = trace(load_checkpoint(tiny_checkpoint), VAE_DECODER, "fp16")
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {onnx_ir.DataType.FLOAT16}
    ops = {node.op_type for node in model.graph}
    assert "InstanceNormalization" in ops and "ReduceMean" not in ops


def test_fp16_holds_its_tolerances(tiny_checkpoint, half_bundle):
    checkpoint = load_checkpoint(tiny_checkpoint)
    rows = check_graphs(checkpoint, half_bundle) + check_loop(checkpoint, half_bundle)
    assert not [row for row in rows if not row.passed]
    assert {row.tolerance for row in rows} == {4e-3, 35.0, 0.99}
    assert min(row.value for row in rows) > 1e-5, "rounded to FP16 somewhere"


def test_graphs_are_strongly_typed(half_bundle):
    """The checker infers every type and refuses a node whose inputs differ; the surface is as bundle.py says."""
    assert open_bundle(half_bundle).manifest.precision == "fp16"
    for graph in GRAPHS:
        path = half_bundle / graph
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            kind = value.type.tensor_type.elem_type
            if value.name not in ("input_ids", "query_valid"):
                assert kind == (FLOAT if value.name in FLOAT_VALUES else HALF), value.name
        assert {v.name for v in model.graph.input} == set(GRAPH_IO[graph][0])
        wide = [t for t in model.graph.initializer if t.data_type == FLOAT and np.prod(t.dims) > 1024]
        assert not wide, "large weights are all of FP16"


def test_islands_are_fp32_and_products_fp16(half_bundle):
    inferred = onnx.shape_inference.infer_shapes(onnx.load(half_bundle / UNET_GROUNDED))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    seen = {node.op_type: set() for node in inferred.graph.node}
    for node in inferred.graph.node:
        seen[node.op_type] |= {kinds[name] for name in node.output}
    assert all(seen[op] == {FLOAT} for op in ISLANDS)
    assert seen["Conv"] == seen["MatMul"] == seen["Softmax"] == seen["LayerNormalization"] == {HALF}


def test_both_unets_read_the_same_half_weights(half_bundle, tiny_bundle):
    named = lambda graph: {
        t.name: [e.value for e in t.external_data]
        for t in onnx.load(half_bundle / graph, load_external_data=False).graph.initializer
        if t.external_data
    }
    plain, grounded = named(UNET), named(UNET_GROUNDED)
    assert len(plain) > 100 and plain.items() < grounded.items()
    size = lambda bundle: (bundle / "weights.0.bin").stat().st_size
    assert size(half_bundle) < 0.7 * size(tiny_bundle)  # not 0.5: tensors are aligned to pages, and tiny


def overflow(graph, model):
    """Scale a convolution that a group norm follows: nothing changes in FP32, and FP16 passes 65504."""
    if graph in (UNET, UNET_GROUNDED):
        value = model.graph.initializers["denoiser.unet.down_blocks.1.resnets.0.conv1.weight"]
        value.const_value = onnx_ir.Tensor(value.const_value.numpy() * np.float32(5e5), name=value.name)


def test_drift_names_a_planted_overflow(tiny_bundle, tmp_path, capsys):
    planted = to_half_bundle(tiny_bundle, tmp_path / "planted", overflow)
    assert drift.main([str(planted), "--graph", UNET, "--graph", TEXT_ENCODER]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    unet = next(i for i, words in enumerate(lines) if words[0] == f"{UNET}:")
    first = lines[unet + 1]
    assert first[:3] == ["first", "not", "finite"] and first[4] == "Conv"
    assert "denoiser.unet.down_blocks.1.resnets.0.conv1" in first
    text = next(i for i, words in enumerate(lines) if words[0] == f"{TEXT_ENCODER}:")
    assert lines[text + 1] == ["first", "not", "finite", "none"]


def test_drift_of_a_sound_bundle(half_bundle):
    counts = {}
    for graph, layers in drift.drift(open_bundle(half_bundle)):
        counts[graph] = len(layers)
        assert all(layer.error < 0.1 for layer in layers), graph
        assert 1e-5 < layers[-1].error < 1e-2 and layers[-1].name in GRAPH_IO[graph][1]
    assert counts[UNET_GROUNDED] > counts[UNET] > counts[VAE_DECODER] > 50


def test_drift_wants_an_fp16_bundle(tiny_bundle, capsys):
    assert drift.main([str(tiny_bundle)]) == 2
    assert "is of fp32; drift is that of an fp16 bundle" in capsys.readouterr().err


def test_polygraphy_marks_the_same_layers(half_bundle, tmp_path):
    """NVIDIA's own tool, which runs these graphs on TensorRT too: the same values, and the same errors."""
    from polygraphy import constants
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.logger import G_LOGGER

    bundle = open_bundle(half_bundle)
    twin = drift.widen(bundle, tmp_path)
    ids = np.random.default_rng(0).integers(0, 600, (2, bundle.manifest.context_length))
    values = []
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        for path in (bundle.file(TEXT_ENCODER), twin.file(TEXT_ENCODER)):
            model = ModifyOutputs(OnnxFromPath(str(path)), outputs=constants.MARK_ALL)
            with OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(model))) as runner:
                values.append(runner.infer({"input_ids": ids}))
    layers = drift.compare(bundle, twin, TEXT_ENCODER, [{"input_ids": ids}])
    assert len(layers) > 50 and {layer.name for layer in layers} <= values[0].keys()
    for layer in layers:
        actual, expected = (part[layer.name].astype(np.float64) for part in values)
        error = relative_l2(actual, expected)
        assert layer.error == pytest.approx(error, rel=0.3, abs=1e-4), layer
