"""A traced FP32 graph as a strongly typed FP16 one: weights and products in FP16, FP32 islands where they are needed.

Every node has one of three roles, by its op type alone, so the result is the same on every machine:

- products (convolutions, matrix products, fused attention) take and give FP16, whatever feeds them;
- islands (`ISLANDS`, each with its reason) take and give FP32;
- everything else computes in the widest type among its inputs. What follows an island therefore stays FP32 up to the
  next product: a group norm, its scale and shift and its SiLU are one FP32 chain, rounded once, before the convolution.
Such a chain is what backends fuse into one kernel that reads and writes FP16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import common as passes

from grounded_diffusion.bundle import GRAPH_IO, OPTIONAL_OUTPUTS, PRESENCE

FLOAT, HALF = onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16
HALF_MAX = float(np.finfo(np.float16).max)
MASKED = 3e4  # what a constant beyond FP16 becomes, with its sign: such are masks, to which a score is yet added

# Values of a graph's surface that are FP32; all its other floating-point inputs and outputs are FP16.
FLOAT_VALUES = {
    "timestep": "FP16 has steps of 1/2 from 512 on, and the embedding's phase is up to 1000 radians",
    "mask_logits": "they are upsampled and compared with 0; small, so it costs nothing",
    PRESENCE: "a number an object, so it costs nothing",
}

# Op types computed in FP32, and why. Tried and left out, as neither a NaN nor an error above rounding was measured on
# the shipped model: Softmax (its scores come from a product in FP16 either way, and casts around it keep backends from
# fusing attention), LayerNormalization (keeps its statistics in FP32 by itself), the last convolution.
ISLANDS = {
    "InstanceNormalization": "group norm: in 12 of the shipped UNet's 30 the squares of a group pass 65504, up to 2e7",
    "ReduceMean": "norms written out: mean squares pass 65504; deviations and their squares follow the mean into FP32",
}
PRODUCTS = {"Conv", "MatMul", "Gemm", "LayerNormalization", "MultiHeadAttention", "GroupNorm", "BiasSplitGelu"}
# Inputs that the operator itself wants in FP32, by position. LayerNormalization keeps its statistics in FP32 by itself.
FLOAT_INPUTS = {"Resize": (1, 2), "GroupNorm": (1, 2)}
ANY_TYPE = {"Shape", "Size", "IsNaN", "Cast"}  # read a value as it is


def to_half(model: onnx_ir.Model, graph: str, inside: onnx_ir.DataType = HALF) -> onnx_ir.Model:
    """Convert one of the bundle's FP32 graphs, in place; see the module. Returns the model.

    `inside`: FLOAT for a graph that is one island: FP16 goes in and comes out, and nothing else changes.
    """
    _Converter(model, graph, inside).run()
    return model


class _Converter:
    """One conversion. Values keep their names; only casts and converted weights are new."""

    def __init__(self, model: onnx_ir.Model, graph: str, inside: onnx_ir.DataType):
        self.model, self.graph, self.inside = model, model.graph, inside
        self.casts: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = {}
        parts = (*GRAPH_IO[graph], OPTIONAL_OUTPUTS.get(graph, {}))
        self.surface = {name: FLOAT if name in FLOAT_VALUES else HALF for part in parts for name in part}

    def run(self) -> None:
        passes.ShapeInferencePass()(self.model)
        self.floats = {v for v in self._values() if v.dtype == FLOAT}
        for value in self.graph.inputs:
            if value in self.floats:
                value.dtype = self.surface[value.name]
        for node in list(self.graph):
            self._convert(node)
        for i, value in enumerate(list(self.graph.outputs)):
            if value in self.floats:
                self._output(i, value)
        passes.RemoveUnusedNodesPass()(self.model)

    def _values(self):
        yield from self.graph.inputs
        yield from self.graph.initializers.values()
        for node in self.graph:
            yield from node.outputs

    def _convert(self, node: onnx_ir.Node) -> None:
        """Give a node its type, cast what it reads, and mark what it makes."""
        read = [(i, value) for i, value in enumerate(node.inputs) if value in self.floats]
        made = [value for value in node.outputs if value in self.floats]
        if not read and not made:
            return
        dtype = self._role(node, [value for _, value in read])
        if node.op_type not in ANY_TYPE:
            for i, value in read:
                node.replace_input_with(
                    i, self._cast(value, FLOAT if i in FLOAT_INPUTS.get(node.op_type, ()) else dtype)
                )
        if node.op_type == "Cast" and made:
            node.attributes["to"] = onnx_ir.AttrInt64("to", dtype)
        for value in made:
            value.dtype = dtype

    def _role(self, node: onnx_ir.Node, read: list[onnx_ir.Value]) -> onnx_ir.DataType:
        if node.op_type in ISLANDS or self.inside == FLOAT:
            return FLOAT
        if node.op_type in PRODUCTS:
            return HALF
        wide = any(value.dtype == FLOAT and not value.is_initializer() for value in read)
        return FLOAT if wide else HALF

    def _cast(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        """The value in another type: a converted copy of a weight, else one Cast node behind the value's producer."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self._weight(value) if value.is_initializer() else self._cast_node(value, dtype)
        return self.casts[value, dtype]

    def _weight(self, value: onnx_ir.Value) -> onnx_ir.Value:
        array = value.const_value.numpy()
        array = np.where(np.abs(array) > HALF_MAX, np.copysign(MASKED, array), array).astype(np.float16)
        name = f"{value.name}.half"
        half = onnx_ir.Value(name=name, shape=value.shape, type=onnx_ir.TensorType(HALF))
        half.const_value = onnx_ir.Tensor(array, name=name)
        self.graph.register_initializer(half)
        return half

    def _cast_node(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        suffix = "half" if dtype == HALF else "float"
        node = onnx_ir.Node(
            "", "Cast", [value], [onnx_ir.AttrInt64("to", dtype)], name=f"cast_{value.name}_{suffix}"
        )  # fmt: skip
        out = node.outputs[0]
        out.name, out.dtype, out.shape = f"{value.name}.{suffix}", dtype, value.shape
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return out

    def _output(self, i: int, value: onnx_ir.Value) -> None:
        """A graph's output keeps its name, whatever type its producer gives."""
        name = value.name
        if value.dtype != self.surface[name]:
            value.name = f"{name}.inner"
            cast = self._cast(value, self.surface[name])
            cast.name = name
            self.graph.outputs[i] = cast
