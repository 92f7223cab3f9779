"""ONNX Runtime's fused operators, run on the CPU: attention by its kernel, the others by their definitions."""

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from helpers.errors import relative_l2
from torch import nn

from grounded_diffusion.export.graphs import quiet, swapped
from grounded_diffusion.export.rewrites.fused import as_standard, fuse_silu, fused

WIDTH, TEXT, GELU = 16, 12, 1280  # GELU is the least that the kernel of BiasSplitGelu takes


class Block(nn.Module):
    """What a UNet is made of: norms with and without SiLU, self- and cross-attention, a GEGLU."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, WIDTH), nn.GroupNorm(2, WIDTH, eps=1e-3)
        self.conv, self.silu = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU()
        self.itself = Attention(WIDTH, heads=2, dim_head=8)
        self.cross = Attention(WIDTH, cross_attention_dim=TEXT, heads=4, dim_head=4)
        self.geglu, self.out = GEGLU(WIDTH, GELU), nn.Linear(GELU, WIDTH)

    def forward(self, x, context):
        y = x + self.conv(self.silu(self.norm1(x)))
        rows = self.norm2(y).flatten(2).transpose(1, 2)  # [N,hw,C]
        rows = rows + self.itself(rows)
        rows = rows + self.cross(rows, encoder_hidden_states=context)
        return rows + self.out(self.geglu(rows))


@pytest.fixture(scope="module")
def exported():
    """(the block, its inputs, the fused graph)"""
    torch.manual_seed(0)
    block = Block().eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    inputs = {"x": torch.randn(2, WIDTH, 4, 6) * 3 + 5, "context": torch.randn(2, 7, TEXT)}
    with torch.no_grad(), quiet():
        program = torch.onnx.export(swapped(block, fused), kwargs=inputs, dynamo=True, verbose=False, opset_version=20)
    fuse_silu(program.model)
    return block, inputs, onnx_ir.serde.serialize_model(program.model)


def test_every_module_becomes_its_operator(exported):
    _, _, model = exported
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("GroupNorm") == 2
    assert ops.count("MultiHeadAttention") == 2
    assert ops.count("BiasSplitGelu") == 1
    assert not {"InstanceNormalization", "Softmax", "Sigmoid", "Gelu", "Split"} & set(ops)
    activations = [
        onnx.helper.get_node_attr_value(n, "activation") for n in model.graph.node if n.op_type == "GroupNorm"
    ]
    assert activations == [1, 0]


def test_fused_operators_equal_the_modules(exported):
    block, inputs, model = exported
    standard = as_standard(onnx.ModelProto.FromString(model.SerializeToString()))
    session = onnxruntime.InferenceSession(standard.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = block(**inputs)
    error = relative_l2(actual, expected)
    assert error < 1e-5


def test_what_the_kernels_cannot_take_stays():
    assert fused(nn.GroupNorm(16, 48)) is None  # three channels a group, and the kernel reads pairs
    assert fused(nn.GroupNorm(1, 1024)) is None
    assert fused(GEGLU(WIDTH, 384)) is None
    assert fused(nn.Conv2d(4, 4, 1)) is None


def test_swapping_leaves_the_original(exported):
    block, _, _ = exported
    twin = swapped(block, fused)
    assert isinstance(block.norm1, nn.GroupNorm)
    assert twin.norm1.weight is block.norm1.weight
    assert type(block.itself.processor) is not type(twin.itself.processor)
