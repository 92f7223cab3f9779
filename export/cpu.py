"""The UNets as ONNX Runtime's CPU provider runs them fastest: the same functions in other operators.

Measured on the shipped model, 32 rows on one thread: 6% less time on a machine at rest, 12% on a busy one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir
from onnx_ir.passes import common as passes

DOMAIN = "com.microsoft"
HEADS_OUT = ["Transpose", "Reshape"]  # from a product's output back to what was split into heads


def for_cpu(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 graph with the three rewrites below; weights are shared."""
    model = model.clone()
    fuse_attention(model)
    split_geglu(model)
    scale_norms(model)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[DOMAIN] = 1
    return model


def cut_context(model: onnx_ir.Model) -> onnx_ir.Model:
    """Take the products of the context with weights, cross-attention's keys and values, out of a UNet.

    They become inputs of `model` in the place of the context. Returned is the graph that makes them: they are the same
    at every step.
    """
    source = next(value for value in model.graph.inputs if value.name == "context")
    products = [node for node, _ in source.uses() if node.op_type == "MatMul" and node.inputs[1].is_initializer()]
    maker = model.clone()
    names = {node.outputs[0].name for node in products}
    maker.graph.outputs[:] = [node.outputs[0] for node in maker.graph if node.outputs[0].name in names]
    passes.RemoveUnusedNodesPass()(maker)
    maker.graph.inputs[:] = [value for value in maker.graph.inputs if value.name == "context"]
    for node in products:
        made = node.outputs[0]
        given = onnx_ir.Value(name=made.name, shape=made.shape, type=made.type)
        made.replace_all_uses_with(given)
        model.graph.remove(node, safe=True)
        model.graph.inputs.append(given)
    if not source.uses():
        model.graph.inputs.remove(source)
    passes.RemoveUnusedNodesPass()(model)
    return maker


def fuse_attention(model: onnx_ir.Model) -> None:
    """Softmax attention without a mask -> MultiHeadAttention: no transposes of heads, no scores in memory."""
    for softmax in _nodes(model, "Softmax"):
        scores, product = softmax.inputs[0].producer(), _only_user(softmax)
        merged = _only_user(_only_user(product))
        if scores is None or scores.op_type != "MatMul" or product is None or merged is None:
            continue
        query = _back(scores.inputs[0], ["Mul", *HEADS_OUT])
        key = _back(scores.inputs[1], ["Mul", "Reshape", "Transpose", "Reshape", *HEADS_OUT])
        value = _back(product.inputs[1], HEADS_OUT)
        if None in (query, key, value) or merged.op_type != "Reshape":
            continue
        heads = product.outputs[0].shape[1]
        scale = np.prod([factor.producer().inputs[1].const_value.numpy() for factor in scores.inputs])
        attributes = [onnx_ir.AttrInt64("num_heads", heads), onnx_ir.AttrFloat32("scale", float(scale))]
        _replace(model, merged, onnx_ir.Node(DOMAIN, "MultiHeadAttention", [query, key, value], attributes, version=1))


def split_geglu(model: onnx_ir.Model) -> None:
    """One product that is then split in halves -> two products of half the weights, which fuse with bias and GELU."""
    for split in _nodes(model, "Split"):
        add = split.inputs[0].producer()
        product = add.inputs[0].producer() if add is not None and add.op_type == "Add" else None
        if product is None or product.op_type != "MatMul" or len(split.outputs) != 2:
            continue
        x, weight, bias = *product.inputs, add.inputs[1]
        if not (weight.is_initializer() and bias.is_initializer()):
            continue
        weights, biases = _halves(model, split, weight, 1), _halves(model, split, bias, 0)
        for old, half, shift in zip(split.outputs, weights, biases, strict=True):
            part = _insert(model, split, onnx_ir.Node("", "MatMul", [x, half]))
            _insert(model, split, sum_ := onnx_ir.Node("", "Add", [part.outputs[0], shift]))
            old.replace_all_uses_with(sum_.outputs[0])


def scale_norms(model: onnx_ir.Model) -> None:
    """Scale and shift of a group norm -> one BatchNormalization of mean 0 and variance 1: one pass instead of two."""
    for norm in _nodes(model, "InstanceNormalization"):
        scaled = _only_user(reshaped := _only_user(norm))
        shifted = _only_user(scaled)
        if shifted is None or [reshaped.op_type, scaled.op_type, shifted.op_type] != ["Reshape", "Mul", "Add"]:
            continue
        vectors = [node.inputs[1].const_value.numpy().reshape(-1) for node in (scaled, shifted)]
        vectors += [np.zeros_like(vectors[0]), np.ones_like(vectors[0])]
        names = [f"{norm.outputs[0].name}.{part}" for part in ("scale", "shift", "mean", "variance")]
        values = [_weight(model, name, vector) for name, vector in zip(names, vectors, strict=True)]
        inputs, epsilon = [reshaped.outputs[0], *values], [onnx_ir.AttrFloat32("epsilon", 0.0)]
        _replace(model, shifted, onnx_ir.Node("", "BatchNormalization", inputs, epsilon))


def _nodes(model: onnx_ir.Model, op_type: str) -> Iterator[onnx_ir.Node]:
    return iter([node for node in model.graph if node.op_type == op_type])


def _only_user(node: onnx_ir.Node | None) -> onnx_ir.Node | None:
    users = list(node.outputs[0].consumers()) if node is not None else []
    return users[0] if len(users) == 1 else None


def _back(value: onnx_ir.Value, ops: list[str]) -> onnx_ir.Value | None:
    """Follow first inputs through nodes of these types; None where the types differ."""
    for op in ops:
        node = value.producer()
        if node is None or node.op_type != op:
            return None
        value = node.inputs[0]
    return value


def _insert(model: onnx_ir.Model, before: onnx_ir.Node, node: onnx_ir.Node) -> onnx_ir.Node:
    model.graph.insert_before(before, node)
    return node


def _replace(model: onnx_ir.Model, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    new.outputs[0].dtype, new.outputs[0].shape = old.outputs[0].dtype, old.outputs[0].shape
    old.outputs[0].replace_all_uses_with(_insert(model, old, new).outputs[0])


def _halves(model: onnx_ir.Model, before: onnx_ir.Node, weight: onnx_ir.Value, axis: int) -> list[onnx_ir.Value]:
    """The halves of a weight; ONNX Runtime splits it when it opens the graph, so it is stored once."""
    attributes = [onnx_ir.AttrInt64("axis", axis), onnx_ir.AttrInt64("num_outputs", 2)]
    return list(_insert(model, before, onnx_ir.Node("", "Split", [weight], attributes, num_outputs=2)).outputs)


def _weight(model: onnx_ir.Model, name: str, array: np.ndarray) -> onnx_ir.Value:
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    value.const_value = onnx_ir.Tensor(array, name=name)
    model.graph.register_initializer(value)
    return value
