"""Floating-point operations of an ONNX graph, counted on the graph itself at given sizes.

A multiply-add is two operations. Only contractions count (convolutions, matrix products, attention), as in
torch's FlopCounterMode: the rest of a diffusion model is well below a per cent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grounded_diffusion.errors import BackendError
from grounded_diffusion.export.shapes import Shapes, infer_shapes

CONTRACTIONS = ("attention", "conv", "einsum", "gemm", "matmul")  # an operation with this in its name is never left out
SUBGRAPHS = ("If", "Loop", "Scan")


def convolution(node: Any, attributes: dict[str, Any], shape: Shapes) -> int:
    """Conv [N,C,..] with weight [M,C/groups,k..]; com.microsoft's NhwcConv has the channels last in both."""
    out, weight = shape[node.output[0]], shape[node.input[1]]
    return 2 * math.prod(out) * math.prod(weight[1:])


def transposed_convolution(node: Any, attributes: dict[str, Any], shape: Shapes) -> int:
    """ConvTranspose [N,C,..] with weight [C,M/groups,k..]: every input value meets all of its row of the weight."""
    return 2 * math.prod(shape[node.input[0]]) * math.prod(shape[node.input[1]][1:])


def matrix_product(node: Any, attributes: dict[str, Any], shape: Shapes) -> int:
    """MatMul, Gemm and their fused forms: the contracted axis is A's last, or the one before where A is transposed."""
    a = shape[node.input[0]]
    contracted = a[-2] if attributes.get("transA") and len(a) > 1 else a[-1]
    return 2 * math.prod(shape[node.output[0]]) * contracted


def einsum(node: Any, attributes: dict[str, Any], shape: Shapes) -> int:
    """Einsum of two operands without "...": the product over all letters."""
    left = attributes["equation"].decode().replace(" ", "").split("->")[0].split(",")
    size = {letter: n for term, name in zip(left, node.input, strict=True) for letter, n in zip(term, shape[name])}  # noqa: B905
    return 2 * math.prod(size.values())


def attention(node: Any, attributes: dict[str, Any], shape: Shapes) -> int:
    """Scores and weighted values, 2 B heads L S (d_qk + d_v), of ONNX's Attention and com.microsoft's two.

    Layouts: ONNX [B,heads,L,d] or [B,L,heads d]; MultiHeadAttention [B,L,heads d], packed key and value
    [B,S,heads,2,d], packed all [B,L,heads,3,d]; com.microsoft's Attention [B,L,C], with the projections inside it.
    """
    inputs = [shape[name] if name else None for name in node.input]
    query = inputs[0]
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        batch, length, channels = query
        if inputs[4:5] not in ([], [None]):
            raise BackendError(f"{node.name}: an Attention with a past is not counted")
        projected = inputs[1][1]
        widths = attributes.get("qkv_hidden_sizes") or [projected // 3] * 3
        return 2 * batch * length * (channels * projected + length * (widths[0] + widths[2]))
    batch = query[0]
    if len(query) == 5:  # packed
        length, heads, width = query[1], query[2], query[4]
        return 4 * batch * heads * length * length * width
    length, total = (query[2], query[1] * query[3]) if len(query) == 4 else (query[1], query[2])
    key, value = inputs[1], inputs[2] if len(inputs) > 2 else None
    if len(key) == 5:
        return 4 * batch * length * key[1] * total
    keys = key[2] if len(key) == 4 else key[1]
    out = math.prod(shape[node.output[0]]) // (batch * length) if value is not None else total
    return 2 * batch * length * keys * (total + out)


COUNTED = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv"), convolution),
    "ConvTranspose": transposed_convolution,
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "GemmFastGelu"), matrix_product),
    "Einsum": einsum,
    **dict.fromkeys(("Attention", "MultiHeadAttention"), attention),
}


def count_flops(path: str | Path, sizes: Mapping[str, int]) -> Counter[str]:
    """Operations of one call of a graph, by kind of node.

    Args:
        path: the ONNX file; its weights need not be there.
        sizes: a size for every named free axis of the inputs, as from `export.shapes.axis_sizes`.

    Raises:
        UsageError: a free axis has no size.
        BackendError: a shape cannot be told, or the graph holds a contraction that is not known here.
    """
    from onnx.helper import get_attribute_value

    model, shape = infer_shapes(Path(path), sizes)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in SUBGRAPHS:
            raise BackendError(f"{path}: {node.op_type} holds a graph of its own, whose operations are not counted")
        if (rule := COUNTED.get(node.op_type)) is None:
            if any(name in node.op_type.lower() for name in CONTRACTIONS):
                raise BackendError(f"{path}: operations of {node.op_type} are not counted")
            continue
        try:
            counts[node.op_type] += rule(node, {a.name: get_attribute_value(a) for a in node.attribute}, shape)
        except KeyError as error:
            raise BackendError(f"{path}: the shape of {error} is not known") from None
    return counts


def count_torch_flops(run: Callable[[], Any]) -> int:
    """Operations of what `run` does in torch, by torch's own count, to which the CPU's fused attention is added."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    attention = lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    return counter.get_total_flops()
