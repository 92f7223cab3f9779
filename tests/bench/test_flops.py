"""Operations counted on ONNX graphs, against torch's own count and against graphs whose count is known."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from grounded_diffusion.bench.flops import count_flops, count_torch_flops
from grounded_diffusion.bundle import GRAPHS
from grounded_diffusion.errors import BackendError, UsageError
from grounded_diffusion.export.shapes import axis_sizes

SD15_UNET = 803e9  # one forward pass at 64x64 latents: convolutions 418, linear 256, self-attention 122


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("batch", "objects", "height", "width"), [(1, 1, 16, 16), (3, 2, 16, 24)])
def test_exported_graphs_agree_with_torch(tiny_checkpoint, tiny_bundle, graph, batch, objects, height, width):
    from grounded_diffusion.export.graphs import MODULES, Sizes, example_inputs
    from grounded_diffusion.training.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(tiny_checkpoint)
    inputs = example_inputs(checkpoint, graph, Sizes(batch, objects, height, width))
    module = MODULES[graph](checkpoint).eval()
    expected = count_torch_flops(lambda: module(**inputs))
    counts = count_flops(tiny_bundle / graph, axis_sizes(batch, objects, height, width))
    assert sum(counts.values()) == pytest.approx(expected, rel=0.01)
    assert expected > 1e6


def test_operations_of_stable_diffusion():
    """torch counts 803 GFLOP for the UNet of Stable Diffusion 1.5, from shapes alone."""
    import torch
    from diffusers import UNet2DConditionModel

    from grounded_diffusion.bench.grounding import SIZES

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES["sd15"]).eval()
        inputs = torch.randn(1, 4, 64, 64), torch.ones(1), torch.randn(1, 77, 768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert count_torch_flops(lambda: unet(*inputs)) == pytest.approx(SD15_UNET, rel=0.005)


@pytest.mark.slow
def test_the_graph_of_stable_diffusion_has_as_many(tmp_path):
    """Exported without weights: minutes of tracing, little memory."""
    import onnx_ir
    import onnxscript.optimizer
    import torch
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from grounded_diffusion.bench.grounding import SIZES
    from grounded_diffusion.export.graphs import quiet

    with FakeTensorMode(), torch.no_grad(), quiet():
        unet = UNet2DConditionModel(**SIZES["sd15"]).eval()
        inputs = torch.randn(1, 4, 64, 64), torch.ones(1), torch.randn(1, 77, 768)
        model = torch.onnx.export(unet, inputs, dynamo=True, optimize=False, verbose=False).model
    for name, _ in unet.named_parameters():  # weights become inputs: there is nothing of them but shapes
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    onnxscript.optimizer.optimize(model, num_iterations=1, onnx_shape_inference=False)
    onnx_ir.save(model, tmp_path / "unet.onnx")
    assert sum(count_flops(tmp_path / "unet.onnx", {}).values()) == pytest.approx(SD15_UNET, rel=0.005)


def save(path, nodes, inputs, outputs=("y",), initializers=(), domains=("", "com.microsoft")):
    """A graph of the given nodes; `inputs` by name with their shapes."""
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes, "graph", [value(n, s) for n, s in inputs.items()], [value(n, None) for n in outputs], initializers
    )
    opsets = [helper.make_opsetid(domain, 20 if not domain else 1) for domain in domains]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


# kind and inputs, attributes, shapes, expected count
MHA = dict(domain="com.microsoft", num_heads=4)
QUERY, KEYS = ["B", 10, 32], ["B", 7, 32]
CASES = {
    "conv": ("Conv x w", dict(group=2, pads=[1, 1, 1, 1]), [["B", 4, 6, 6], [8, 2, 3, 3]], 3 * 8 * 36 * 36),
    "transposed": ("ConvTranspose x w", dict(strides=[2, 2]), [["B", 4, 6, 6], [4, 8, 2, 2]], 3 * 4 * 36 * 64),
    "gemm": ("Gemm x w", dict(transA=1, transB=1), [[5, "B"], [7, 5]], 2 * 3 * 7 * 5),
    "matmul": ("MatMul x w", {}, [["B", 2, 5, 6], [6, 7]], 2 * 3 * 2 * 5 * 6 * 7),
    "einsum": ("Einsum x w", dict(equation="bod,bdhw->bohw"), [["B", 2, 8], ["B", 8, 4, 4]], 2 * 3 * 2 * 8 * 16),
    "attention": ("MultiHeadAttention q k v", MHA, [QUERY, KEYS, KEYS], 4 * 3 * 10 * 7 * 32),
    "packed": ("MultiHeadAttention qkv", MHA, [["B", 10, 4, 3, 8]], 4 * 3 * 10 * 10 * 32),
    "packed kv": ("MultiHeadAttention q kv", MHA, [QUERY, ["B", 7, 4, 2, 8]], 4 * 3 * 10 * 7 * 32),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_of_nodes(tmp_path, case):
    told, attributes, shapes, expected = CASES[case]
    kind, *names = told.split()
    node = helper.make_node(kind, names, ["y"], **attributes)
    path = save(tmp_path / "graph.onnx", [node], dict(zip(names, shapes, strict=True)))
    assert count_flops(path, {"B": 3}) == {kind: expected}


def test_attention_with_its_projections_inside(tmp_path):
    node = helper.make_node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=4)
    path = save(tmp_path / "graph.onnx", [node], dict(x=["B", 10, 16], w=[16, 96], b=[96]))
    assert sum(count_flops(path, {"B": 2}).values()) == 2 * 2 * 10 * (16 * 96 + 10 * (32 + 32))


def test_what_is_not_known_is_refused(tmp_path):
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    path = save(tmp_path / "graph.onnx", [node], dict(x=["B", 4], w=[4, 4]))
    with pytest.raises(UsageError, match="free axis B"):
        count_flops(path, {"N": 1})
    with pytest.raises(BackendError, match="MatMulInteger are not counted"):
        count_flops(path, {"B": 1})
