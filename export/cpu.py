"""UNets and decoder as ONNX Runtime's CPU provider runs them fastest: the same functions in other operators.

Measured on the shipped model, guided calls of 16 images on one thread: attention, GEGLU and group norms take 6% off the
time, keys and values made once a batch 7%, folded upsampling 5%, and what both halves of guidance share 8%.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir
from onnx_ir.passes import common as passes

from grounded_diffusion.bundle import SHARED_ROWS

DOMAIN = "com.microsoft"
SAME = ("latents", "timestep")  # inputs of a UNet that are the same in both halves of guidance
HEADS_OUT = ["Transpose", "Reshape"]  # from a product's output back to what was split into heads


def for_cpu(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 graph with the four rewrites below; weights are shared."""
    model = model.clone()
    passes.ShapeInferencePass()(model)
    fuse_attention(model)
    split_geglu(model)
    scale_norms(model)
    fold_upsampling(model)
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


def share_halves(model: onnx_ir.Model) -> None:
    """Run once what both halves of guidance have in common: all that comes before the first cross-attention.

    Of a UNet that `cut_context` has been through. Its `latents` and `timestep` then have S rows, keys and values S or
    2 S, and what leaves the common part is repeated on the way.
    """
    graph = model.graph
    same = [value for value in graph.inputs if value.name in SAME]
    others = [value for value in graph.inputs if value.name not in SAME]
    common = (_after(same) - _after(others)) & _before(graph.outputs[0])  # the head's own nodes tell the halves apart
    made = dict.fromkeys([*same, *(value for node in graph if node in common for value in node.outputs)])
    uses = [(value, node, at) for value in made for node, at in value.uses() if node not in common]
    rows = [_append(model, "Shape", [value], dict(start=0, end=1)) for value in (others[-1], same[0])]
    times, all_rows = _append(model, "Div", rows), others[-1].shape[0]
    names = {str(all_rows), str(same[0].shape[0])}
    again: dict[onnx_ir.Value, onnx_ir.Value] = {}

    def repeated(value: onnx_ir.Value) -> onnx_ir.Value:
        if value not in made:
            return value
        if value not in again and value.dtype == onnx_ir.DataType.INT64:  # a size: that of what is repeated
            node = value.producer()
            again[value] = _append(model, node.op_type, map(repeated, node.inputs), node.attributes)
        elif value not in again:
            repeats = [times, _weight(model, f"{value.name}.once", np.ones(len(value.shape) - 1, np.int64))]
            again[value] = _append(model, "Tile", [value, _append(model, "Concat", repeats, dict(axis=0))])
            again[value].dtype, again[value].shape = value.dtype, onnx_ir.Shape([all_rows, *value.shape[1:]])
        return again[value]

    for value, node, at in uses:
        node.replace_input_with(at, repeated(value))
    for value in made:
        if value.shape and str(value.shape[0]) in names:
            value.shape = onnx_ir.Shape([SHARED_ROWS, *value.shape[1:]])
    graph.sort()


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
        attributes, place = dict(num_heads=heads, scale=float(scale)), dict(domain=DOMAIN, version=1)
        _replace(model, merged, onnx_ir.node("MultiHeadAttention", [query, key, value], attributes, **place))


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
            part = _insert(model, split, "MatMul", [x, half])
            old.replace_all_uses_with(_insert(model, split, "Add", [part, shift]))


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
        inputs = [reshaped.outputs[0], *values]
        _replace(model, shifted, onnx_ir.node("BatchNormalization", inputs, dict(epsilon=0.0)))


def fold_upsampling(model: onnx_ir.Model) -> None:
    """Nearest upsampling and its 3x3 convolution -> one transposed 4x4 convolution of stride 2: 4/9 of the products.

    Each output pixel sees 2x2 input pixels; weights that meet the same one are summed when the graph is opened.
    """
    spread = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)  # 3 taps, turned round, over 4
    for resize in _nodes(model, "Resize"):
        conv, scales = _only_user(resize), resize.inputs[2] and resize.inputs[2].const_value
        if scales is None or scales.numpy().tolist() != [1, 1, 2, 2] or conv is None or conv.op_type != "Conv":
            continue
        if resize.attributes["mode"].as_string() != "nearest" or conv.attributes["pads"].value != (1,) * 4:
            continue
        weight, *bias = conv.inputs[1:]
        if list(weight.shape[2:]) != [3, 3]:
            continue
        rows, columns = (_weight(model, f"{weight.name}.{n}", m) for n, m in (("rows", spread), ("columns", spread.T)))
        swapped = _insert(model, conv, "Transpose", [weight], dict(perm=[1, 0, 2, 3]))
        wide = _insert(model, conv, "MatMul", [swapped, columns])
        full = _insert(model, conv, "MatMul", [rows, wide])
        geometry = dict(kernel_shape=[4, 4], strides=[2, 2], pads=[1] * 4)
        _replace(model, conv, onnx_ir.node("ConvTranspose", [resize.inputs[0], full, *bias], geometry))


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


def _after(values: Iterable[onnx_ir.Value]) -> set[onnx_ir.Node]:
    """All nodes that depend on any of these."""
    found, waiting = set(), list(values)
    while waiting:
        new = set(waiting.pop().consumers()) - found
        found |= new
        waiting += [value for node in new for value in node.outputs]
    return found


def _before(value: onnx_ir.Value) -> set[onnx_ir.Node]:
    """All nodes on which it depends."""
    found, waiting = set(), [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    return found


def _insert(model: onnx_ir.Model, before: onnx_ir.Node, op_type: str, inputs, attributes=None) -> onnx_ir.Value:
    model.graph.insert_before(before, node := onnx_ir.node(op_type, inputs, attributes))
    return node.outputs[0]


def _append(model: onnx_ir.Model, op_type: str, inputs: Iterable[onnx_ir.Value], attributes=None) -> onnx_ir.Value:
    """The output of a new node; the graph has to be sorted afterwards."""
    model.graph.append(node := onnx_ir.node(op_type, list(inputs), attributes))
    return node.outputs[0]


def _replace(model: onnx_ir.Model, old: onnx_ir.Node, new: onnx_ir.Node) -> None:
    new.outputs[0].dtype, new.outputs[0].shape = old.outputs[0].dtype, old.outputs[0].shape
    model.graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0])


def _halves(model: onnx_ir.Model, before: onnx_ir.Node, weight: onnx_ir.Value, axis: int) -> list[onnx_ir.Value]:
    """The halves of a weight; ONNX Runtime splits it when it opens the graph, so it is stored once."""
    split = onnx_ir.node("Split", [weight], dict(axis=axis, num_outputs=2), num_outputs=2)
    model.graph.insert_before(before, split)
    return list(split.outputs)


def _weight(model: onnx_ir.Model, name: str, array: np.ndarray) -> onnx_ir.Value:
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
