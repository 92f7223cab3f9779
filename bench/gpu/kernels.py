"""A graph as the kernels that a library runs of it: operations and bytes of each, counted at given sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from onnx.helper import get_attribute_value

from grounded_diffusion.bench.flops import COUNTED
from grounded_diffusion.export.shapes import VIEWS, infer_shapes, tensor_bytes

Library = Literal["compiled", "node by node"]
CONVOLUTIONS, ATTENTIONS = ("Conv", "ConvTranspose"), ("Attention", "MultiHeadAttention")
NORMS = ("GroupNorm", "InstanceNormalization", "LayerNormalization")
FREE = (*VIEWS, "Shape", "Constant", "ConstantOfShape", "Range")  # no kernel: views, and shapes that are known before
SCALARS = 256  # bytes below which a node computes shapes


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: what it is, its operations, the bytes it reads and writes, and the rows and columns of its result.

    `fp8`: it multiplies numbers of FP8.
    """

    kind: Literal["convolution", "product", "attention", "other"]
    flops: int
    bytes: int
    rows: int = 0
    columns: int = 0
    fp8: bool = False


def kernels(path: Path, sizes: Mapping[str, int], library: Library) -> list[Kernel]:
    """The kernels of one call of a graph.

    "node by node" runs every node as a kernel, but for views. "compiled" fuses what is computed element by element into
    the product, convolution or norm beside it, and softmax attention into one kernel whose scores are never stored.
    """
    model, shapes = infer_shapes(path, sizes)
    size, graph = tensor_bytes(model, shapes), model.graph
    attention = inside_attention(graph) if library == "compiled" else {}
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found: list[Kernel] = []
    scores = read = 0  # of the first product of an attention, which the second one's kernel does too
    for node in graph.node:
        shape = shapes.get(node.output[0], ())
        if node.op_type in FREE or not shape:
            continue
        rule = COUNTED.get(node.op_type)
        if rule is None and library == "compiled" and node.op_type not in NORMS:
            continue
        flops = rule(node, {a.name: get_attribute_value(a) for a in node.attribute}, shapes) if rule else 0
        names = (*(rounded.get(name, name) for name in node.input), *node.output)
        moved = sum(size.get(name, 0) for name in names if name and name not in attention)
        if moved < SCALARS:
            continue
        if node.op_type in NORMS:
            moved += size.get(node.input[0], 0)  # statistics first, then the values again
        kind = kind_of(node, attention)
        if kind == "attention" and node.output[0] in attention:
            scores, read = flops, moved
            continue
        if kind == "attention" and attention:
            flops, moved, scores, read = flops + scores, moved + read, 0, 0
        tiles = tiled(node, shape) if kind != "attention" else (0, 0)
        found.append(Kernel(kind, flops, moved, *tiles, fp8=bool(rounded.keys() & set(node.input))))
    return found


def kind_of(node: Any, attention: Mapping[str, Any]) -> Any:
    """What bounds a node's kernel."""
    if node.op_type in ATTENTIONS or attention.keys() & {*node.input, *node.output}:
        return "attention" if node.op_type in COUNTED else "other"
    if node.op_type in CONVOLUTIONS:
        return "convolution"
    return "product" if node.op_type in COUNTED else "other"


def tiled(node: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a result, as the product that makes it has them; (0, 0) for what is no product."""
    if node.op_type in CONVOLUTIONS:
        return shape[0] * shape[2] * shape[3], shape[1]
    if node.op_type in COUNTED and node.op_type not in ATTENTIONS:
        rows = 1
        for n in shape[:-1]:
            rows *= n
        return rows, shape[-1]
    return 0, 0


def inside_attention(graph: onnx.GraphProto) -> dict[str, bool]:
    """Tensors between the two products of a softmax attention: scores and weights."""
    makes = {name: node for node in graph.node for name in node.output}
    reads: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            reads.setdefault(name, []).append(node)
    inside: dict[str, bool] = {}
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        before, scores = softmax.input[0], []
        while before in makes and makes[before].op_type != "MatMul":
            scores.append(before)
            before = makes[before].input[0]
        after, weights = softmax.output[0], []
        while (users := reads.get(after, [])) and len(users) == 1 and users[0].op_type != "MatMul":
            weights.append(after)
            after = users[0].output[0]
        if before in makes and users and users[0].op_type == "MatMul":
            inside |= dict.fromkeys((before, *scores, *weights, after), True)
    return inside
