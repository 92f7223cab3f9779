"""The UNets that run on a GPU compute nothing twice, and give what the standard ones give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from helpers.errors import relative_l2
from helpers.plans import fused_attentions

from grounded_diffusion.bench.flops import count_flops
from grounded_diffusion.bundle import CONTEXT, GPU, GRAPHS, SHARED_ROWS, UNET, UNET_GROUNDED, open_bundle
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, engine_spec
from grounded_diffusion.export.engines import build_plan
from grounded_diffusion.export.graphs import Sizes, example_inputs
from grounded_diffusion.export.shapes import axis_sizes
from grounded_diffusion.training.checkpoint import load_checkpoint

ATTENTIONS = 7  # transformer blocks of the tiny UNet; each looks at itself and at the context
BATCH = 2


def products(path, guided=True, **sizes):
    """Operations of one call at 16x16 latents."""
    return sum(count_flops(path, axis_sizes(BATCH, 3, 16, 16, guided) | sizes).values())


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_keys_and_values_are_made_by_another_graph(tiny_bundle, graph):
    bundle = open_bundle(tiny_bundle)
    model = onnx.load(bundle.variant(GPU, graph), load_external_data=False)
    maker = onnx.load(bundle.variant(GPU, CONTEXT), load_external_data=False)
    assert [node.op_type for node in maker.graph.node] == ["MatMul"] * 2 * ATTENTIONS
    for told, shapes in zip((model.graph.input, model.graph.output), bundle.gpu_io(graph), strict=True):
        assert {value.name for value in told} == shapes.keys()
    shape = lambda value: ",".join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
    assert {value.name: shape(value) for value in maker.graph.output} == bundle.manifest.keys_values
    assert len(bundle.manifest.keys_values) == 2 * ATTENTIONS


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_what_is_not_computed_again(tiny_bundle, graph):
    standard, own, context = (tiny_bundle / name for name in (graph, GPU + graph, GPU + CONTEXT))
    assert products(own, **{SHARED_ROWS: 2 * BATCH}) == products(standard) - products(context)
    shared = products(standard) - products(context) - products(own)
    model = onnx.load(standard, load_external_data=False)
    first = {node.output[0]: node for node in model.graph.node if node.op_type == "Conv"}
    conv_in = next(node for node in first.values() if node.input[0] == "latents")
    (width, channels, *kernel) = next(t.dims for t in model.graph.initializer if t.name == conv_in.input[1])
    block = 2 * 16 * 16 * 9 * width * (channels + 2 * width)  # the first convolution, and those of the first block
    assert kernel == [3, 3]
    assert shared > BATCH * block


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_they_equal_the_standard_graphs(request, tiny_checkpoint, graph, precision):
    bundle = open_bundle(request.getfixturevalue("tiny_bundle" if precision == "fp32" else "half_bundle"))
    standard = replace(bundle, manifest=replace(bundle.manifest, files=dict.fromkeys(GRAPHS, "")))
    inputs = example_inputs(load_checkpoint(tiny_checkpoint), graph, Sizes(3, 4, 8, 24), seed=2)
    given = {name: value.numpy() for name, value in inputs.items()}
    given |= {name: given[name][:3] for name in ("latents", "timestep")}
    expected = {name: value.copy() for name, value in OnnxRuntimeBackend(standard).run(graph, given).items()}
    outputs = OnnxRuntimeBackend(bundle, variant=GPU).run(graph, given)
    errors = {name: relative_l2(outputs[name], expected[name]) for name in expected}
    assert max(errors.values()) < (1e-5 if precision == "fp32" else 4e-3), errors
    assert all(np.isfinite(value).all() for value in outputs.values())


def test_tensorrt_fuses_every_attention(half_bundle):
    bundle = open_bundle(half_bundle)
    plan, _ = build_plan(bundle, engine_spec(bundle, UNET, "tensorrt_rtx", 89, Bucket(BATCH)))
    assert fused_attentions(plan) == 2 * ATTENTIONS
