"""Shapes of all tensors of an ONNX graph at given sizes, and the memory that running it takes.

Shapes come from ONNX Runtime's symbolic shape inference, which knows its own fused operations too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from grounded_diffusion.bundle import SHARED_ROWS
from grounded_diffusion.errors import BackendError, UsageError

Shapes = Mapping[str, tuple[int, ...]]
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # the same memory with another shape


def axis_sizes(batch: int, objects: int, height: int, width: int, guided: bool = True) -> dict[str, int]:
    """The free axes of all graphs: B images, O objects, latents of h x w; unguided calls have one row an image."""
    rows = 2 * batch if guided else batch
    return {"B": batch, SHARED_ROWS: batch, "N": rows, "2*B": rows, "O": objects, "h": height, "w": width}


def infer_shapes(path: Path, sizes: Mapping[str, int]) -> tuple[onnx.ModelProto, Shapes]:
    """A graph without its weights, and the shape of every tensor in it.

    Raises:
        UsageError: a free axis of the inputs has no size.
        BackendError: a shape cannot be told.
    """
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for value in graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                if axis.dim_param not in sizes:
                    raise UsageError(f"{path} has a free axis {axis.dim_param}; known are {', '.join(sizes)}")
                axis.dim_value = sizes[axis.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")  # symbols of other axes; they are inferred
    del graph.value_info[:]
    for node in graph.node:  # the tool knows the sum alone; the shapes are the same
        if node.op_type in ("ReduceMax", "ReduceLogSumExp"):
            node.op_type = "ReduceSum"
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in outside:  # weights are left where they are: their shapes are enough
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph.initializer.remove(tensor)
    try:
        model = SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    except Exception as error:  # the tool raises bare Exception
        raise BackendError(f"shapes of {path} cannot be inferred: {str(error).splitlines()[0]}") from None
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        axes = value.type.tensor_type.shape.dim
        if all(axis.HasField("dim_value") for axis in axes):
            known[value.name] = tuple(axis.dim_value for axis in axes)
    return model, known


def tensor_bytes(model: onnx.ModelProto, shapes: Shapes) -> dict[str, int]:
    """Bytes of every tensor whose shape is known."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    width = lambda name: onnx.helper.tensor_dtype_to_np_dtype(types.get(name) or onnx.TensorProto.FLOAT).itemsize
    return {name: math.prod(shape) * width(name) for name, shape in shapes.items()}


def graph_memory(path: Path, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of a graph's weights, and the most that its own tensors take at once, run node after node.

    A tensor lives from the node that makes it to the last one that reads it; what a graph is given and gives lies
    elsewhere. Workspaces of libraries and what an allocator loses between blocks are not counted.
    """
    model, shapes = infer_shapes(path, sizes)
    graph, size = model.graph, tensor_bytes(model, shapes)
    stored = onnx.load(path, load_external_data=False).graph.initializer
    weights = sum(size[tensor.name] for tensor in stored)
    owner: dict[str, str] = {}  # of a view: whose memory it is
    for node in graph.node:
        if node.op_type in VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    own = lambda names: {owner.get(name, name) for name in names}
    outputs = own(value.name for value in graph.output)
    inside = own(name for node in graph.node for name in node.output) - outputs - own(v.name for v in graph.input)
    last = {name: i for i, node in enumerate(graph.node) for name in own((*node.input, *node.output))}
    live = most = 0
    for i, node in enumerate(graph.node):
        live += sum(size.get(name, 0) for name in node.output if name in inside)
        most = max(most, live)
        live -= sum(size.get(name, 0) for name in own((*node.input, *node.output)) & inside if last[name] == i)
    return weights, most
