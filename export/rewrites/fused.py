"""A UNet and a decoder of ONNX Runtime's own fused operators, for its CUDA provider.

The modules are swapped before the trace, so no pattern has to be found again in the graph: attention becomes one
MultiHeadAttention, a GroupNorm with the SiLU behind it one GroupNorm over channels-last memory, a GEGLU one
BiasSplitGelu. Convolutions stay as they are: with `prefer_nhwc` the provider turns them to channels last itself and
cancels the transposes against those beside the norms.

`as_standard` writes the same graph in standard operators again. That is how export checks it on a machine without a
GPU; the fused operators themselves have not been run on a GPU yet.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from onnx_ir.passes import common as passes
from torch import nn
from torch.nn import functional as F
from torch.onnx.ops import symbolic

DOMAIN = "com.microsoft"
# Halves of hidden states that the CUDA kernel of BiasSplitGelu is compiled for (bias_split_gelu_impl.cu).
SPLIT_GELU_SIZES = (1280, 2560, 5120)
LARGEST_GROUP = 512  # channels of a group that the CUDA kernel of GroupNorm takes; it reads two at once

# The fused operators in standard ones. MultiHeadAttention is not here: it has a CPU kernel.
DEFINITIONS = {
    "GroupNorm": """
        <domain: "standard", opset_import: ["" : 20]>
        GroupNorm <groups, epsilon, activation> (x, gamma, beta) => (y) {
            half = Transpose <perm = [0, 3, 1, 2]> (x)
            nchw = Cast <to = 1> (half)
            groups = Constant <value_int: int = @groups> ()
            first = Constant <value_ints = [0]> ()
            last = Constant <value_ints = [-1]> ()
            count = Reshape (groups, last)
            split = Concat <axis = 0> (first, count, last)
            grouped = Reshape (nchw, split)
            axes = Constant <value_ints = [2]> ()
            mean = ReduceMean (grouped, axes)
            centred = Sub (grouped, mean)
            squares = Mul (centred, centred)
            variance = ReduceMean (squares, axes)
            eps = Constant <value_float: float = @epsilon> ()
            raised = Add (variance, eps)
            deviation = Sqrt (raised)
            scaled = Div (centred, deviation)
            shape = Shape (nchw)
            restored = Reshape (scaled, shape)
            nhwc = Transpose <perm = [0, 2, 3, 1]> (restored)
            weighted = Mul (nhwc, gamma)
            shifted = Add (weighted, beta)
            sigmoid = Sigmoid (shifted)
            silu = Mul (shifted, sigmoid)
            activation = Constant <value_int: int = @activation> ()
            active = Cast <to = 9> (activation)
            chosen = Where (active, silu, shifted)
            y = CastLike (chosen, x)
        }""",
    "BiasSplitGelu": """
        <domain: "standard", opset_import: ["" : 20]>
        BiasSplitGelu (x, bias) => (y) {
            biased = Add (x, bias)
            value, gate = Split <axis = -1, num_outputs = 2> (biased)
            gelu = Gelu (gate)
            y = Mul (value, gelu)
        }""",
}


class FusedAttention:
    """diffusers' plain attention without a mask, [N,S,C] -> the same, its middle one MultiHeadAttention."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        attributes = {"num_heads": attn.heads, "scale": float(attn.scale)}
        attended = _operator("MultiHeadAttention", (query, key, value), attributes, query)
        return attn.to_out[0](attended) / attn.rescale_output_factor


class FusedGroupNorm(nn.Module):
    """A GroupNorm by the fused operator, [N,C,h,w] or [N,C,n] -> the same."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.attributes = {"groups": norm.num_groups, "epsilon": norm.eps, "activation": 0, "channels_last": 1}
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.movedim(1, -1)  # [N,h,w,C] or [N,n,C]
        rows = last if x.ndim == 4 else last.unsqueeze(1)
        y = _operator("GroupNorm", (rows, self.weight, self.bias), self.attributes, rows)
        return (y if x.ndim == 4 else y.squeeze(1)).movedim(-1, 1)


class FusedGeglu(nn.Module):
    """A GEGLU whose bias, split, GELU and product are one operator, [N,S,C] -> [N,S,F]."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        self.weight, self.bias = geglu.proj.weight, geglu.proj.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = F.linear(x, self.weight)  # [N,S,2F]
        return _operator("BiasSplitGelu", (both, self.bias), {}, both[..., : both.shape[-1] // 2])


def _operator(name: str, inputs: tuple[torch.Tensor, ...], attributes: dict, like: torch.Tensor) -> torch.Tensor:
    return symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1)


def fused(module: nn.Module) -> nn.Module | None:
    """What takes the place of a module of a UNet or decoder; None: it stays, as the CUDA kernels ask for."""
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        return FusedGroupNorm(module) if size % 2 == 0 and size <= LARGEST_GROUP else None
    if isinstance(module, GEGLU):
        return FusedGeglu(module) if module.proj.out_features // 2 in SPLIT_GELU_SIZES else None
    if isinstance(module, Attention) and module.group_norm is None and module.norm_q is None:
        module.set_processor(FusedAttention())
    return None


def fuse_silu(model: onnx_ir.Model) -> None:
    """Take a SiLU that alone reads a GroupNorm into it, past the transpose between them."""
    for norm in [node for node in model.graph if node.op_type == "GroupNorm"]:
        back = next(iter(norm.outputs[0].consumers()))
        users = set(back.outputs[0].consumers())
        product = next((node for node in users if node.op_type == "Mul"), None)
        if product and {node.op_type for node in users} == {"Sigmoid", "Mul"} and len(users) == 2:
            norm.attributes["activation"] = onnx_ir.AttrInt64("activation", 1)
            product.outputs[0].replace_all_uses_with(back.outputs[0])
    passes.RemoveUnusedNodesPass()(model)


def as_standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, changed in place, with functions of standard operators for the operators the CPU lacks."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in DEFINITIONS:
            node.domain = "standard"
            kept = [a for a in node.attribute if a.name != "channels_last"]
            del node.attribute[:]
            node.attribute.extend(kept)
    model.functions.extend(onnx.parser.parse_function(text) for text in DEFINITIONS.values())
    model.opset_import.append(onnx.helper.make_opsetid("standard", 1))
    return model
