"""Finding and changing nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir

ONE_TO_ONE = dict(group=1, strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0))  # ONNX's defaults of a 2-D convolution


def nodes(model: onnx_ir.Model, op_type: str) -> list[onnx_ir.Node]:
    """All nodes of a type, in a list of its own: the graph may change under the loop."""
    return [node for node in model.graph if node.op_type == op_type]


def geometry(conv: onnx_ir.Node) -> dict[str, Any]:
    """How a 2-D convolution of known kernel moves over its image; what is left out has ONNX's default."""
    return {name: conv.attributes[name].value if name in conv.attributes else ONE_TO_ONE[name] for name in ONE_TO_ONE}


def only_user(node: onnx_ir.Node | None) -> onnx_ir.Node | None:
    """The node that reads a node's first output; None where there are none or several."""
    users = list(node.outputs[0].consumers()) if node is not None else []
    return users[0] if len(users) == 1 else None


def back(value: onnx_ir.Value, ops: Iterable[str]) -> onnx_ir.Value | None:
    """Follow first inputs through nodes of these types; None where the types differ."""
    for op in ops:
        node = value.producer()
        if node is None or node.op_type != op:
            return None
        value = node.inputs[0]
    return value


def after(values: Iterable[onnx_ir.Value]) -> set[onnx_ir.Node]:
    """All nodes that depend on any of these."""
    found, waiting = set(), list(values)
    while waiting:
        new = set(waiting.pop().consumers()) - found
        found |= new
        waiting += [value for node in new for value in node.outputs]
    return found


def before(value: onnx_ir.Value) -> set[onnx_ir.Node]:
    """All nodes on which it depends."""
    found, waiting = set(), [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
    return found


def add(
    model: onnx_ir.Model, op_type: str, inputs: Iterable[onnx_ir.Value], attributes: Mapping[str, Any] | None = None,
    **place: Any,
) -> onnx_ir.Value:  # fmt: skip
    """The first output of a new node at the end of the graph, which has to be sorted when all is done."""
    model.graph.append(node := onnx_ir.node(op_type, list(inputs), attributes, **place))
    return node.outputs[0]


def replace(old: onnx_ir.Node, new: onnx_ir.Value) -> None:
    """Let all that reads a node's only output read `new`, and take the node out."""
    out = old.outputs[0]
    new.dtype, new.shape = out.dtype, out.shape
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    if new.is_graph_output():
        out.name, new.name = None, out.name
    old.graph.remove(old, safe=True)


def constant(model: onnx_ir.Model, name: str, array: np.ndarray) -> onnx_ir.Value:
    """An initializer, made once for a name."""
    if name not in model.graph.initializers:
        model.graph.register_initializer(onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name)))
    return model.graph.initializers[name]
