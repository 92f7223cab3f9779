"""UNets whose products run in FP8, for TensorRT: QuantizeLinear and DequantizeLinear around what a product reads.

TensorRT takes a product behind two DequantizeLinear for one of FP8 that sums in FP32. Weights stay in the graph as they
were, with their rounding behind them, which TensorRT does when it builds: all graphs of a bundle go on sharing them.

Every tensor has one scale. Scales for each output channel of the weights were tried and left out: on the shipped model
the error of a call is the same, since every number of FP8 has an exponent of its own, and for SM 8.9 TensorRT-RTX then
keeps the sums of convolutions in memory before it adds the bias, which takes twice the memory of activations.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir

from grounded_diffusion.export.rewrites.nodes import add, before, constant

FP8 = onnx_ir.DataType.FLOAT8E4M3FN
LARGEST = 448.0  # of its numbers
SMALLEST_SCALE = 2.0**-14  # FP16's smallest normal number: a scale below would lose digits
MULTIPLE = 16  # channels: the tensor cores' tiles of FP8 are of 16 or 32 values, and other sizes are padded
AXES = {"Conv": 4, "MatMul": 3}  # of an activation; products of timesteps have two, and take no time
SUFFIX = ".largest"  # of the names of what `observed` gives


def products(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """Convolutions and products by weights on the way to a UNet's output that gain by FP8.

    Not among them are attention, which is fused, the first and the last convolution, whose latents have few channels,
    and all of the grounding head. Nor are 1x1 convolutions, through which the image itself passes and not what is added
    to it: they take little time, and 17 to 29% of a call's error goes with them.
    """
    way = before(model.graph.outputs[0])

    def gains(node: onnx_ir.Node) -> bool:
        if node not in way or node.op_type not in AXES or not node.inputs[1].is_initializer():
            return False
        given, weight = node.inputs[0].shape, node.inputs[1].shape
        fits = len(given) == AXES[node.op_type] and not any(channels % MULTIPLE for channels in weight[:2])
        return fits and list(weight[2:]) != [1, 1]

    return [node for node in model.graph if gains(node)]


def observed(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of a UNet whose outputs are the largest magnitudes of what its `products` read, named as those values."""
    model = model.clone()
    values = dict.fromkeys(node.inputs[0] for node in products(model))
    model.graph.outputs.clear()
    for value in values:
        wide = add(model, "Cast", [value], dict(to=onnx_ir.DataType.FLOAT))
        largest = add(model, "ReduceMax", [add(model, "Abs", [wide])], dict(keepdims=0))
        largest.name, largest.dtype, largest.shape = value.name + SUFFIX, onnx_ir.DataType.FLOAT, onnx_ir.Shape([])
        model.graph.outputs.append(largest)
    return model


def to_fp8(model: onnx_ir.Model, ranges: Mapping[str, float]) -> None:
    """Put the products of an FP16 UNet into FP8, in place.

    Args:
        ranges: largest magnitude of each value that they read, by name.
    """
    rounded: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in products(model):
        for at, value in enumerate(node.inputs[:2]):
            if value not in rounded:
                largest = np.abs(value.const_value.numpy()).max() if value.is_initializer() else ranges[value.name]
                rounded[value] = in_fp8(model, value, float(largest))
            node.replace_input_with(at, rounded[value])
    model.graph.sort()


def in_fp8(model: onnx_ir.Model, value: onnx_ir.Value, largest: float) -> onnx_ir.Value:
    """A value rounded to FP8, and again of its own type; `largest` is its largest magnitude."""
    scale = np.array(max(largest / LARGEST, SMALLEST_SCALE), value.dtype.numpy())
    inputs = [constant(model, f"{value.name}.scale", scale), constant(model, "fp8.zero", np.zeros((), FP8.numpy()))]
    small = add(model, "QuantizeLinear", [value, *inputs])
    again = add(model, "DequantizeLinear", [small, *inputs])
    small.dtype, again.dtype = FP8, value.dtype
    small.shape = again.shape = value.shape
    return again
