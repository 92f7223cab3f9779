"""UNets and decoder as OpenVINO runs them fastest, in standard operators: see `cpu` for ONNX Runtime's.

Shared with those are the two products of a GEGLU, upsampling inside its convolution, keys and values once a batch, and
halves of guidance that go together up to the first cross-attention. Different are

- attention: heads are split and merged by one transpose each, as OpenVINO's own fusion of attention wants them, and
  keys leave the context's graph transposed;
- group norms: averages are taken channel by channel and only those averaged over a group. A norm of regrouped images
  would bring them from channels-last memory, as convolutions leave them, to rows and back (9% of a guided call);
- the timestep's embedding and its projections, which are the same for all images, are a graph of their own.

Winograd's convolutions are not here: in BF16 they lose what they win.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import common as passes

from grounded_diffusion.export.cpu import HEADS_OUT, cut, fold_upsampling, share_halves, split_geglu
from grounded_diffusion.export.rewrites.nodes import add, back, constant, nodes, only_user, replace


def for_openvino(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 UNet with the rewrites of single layers; weights are shared."""
    model = decoder_for_openvino(model)
    plain_attention(model)
    split_geglu(model)
    norms_by_channel(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return model


def decoder_for_openvino(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 decoder, whose norms are traced as they should be, see graphs.RowwiseGroupNorm."""
    model = model.clone()
    passes.ShapeInferencePass()(model)
    fold_upsampling(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return model


def cut_shared(model: onnx_ir.Model) -> tuple[onnx_ir.Model, onnx_ir.Model]:
    """Take out of a UNet what the context alone makes, and what the timestep alone makes; returned are their graphs.

    The UNet's `latents` then have S rows, keys and values S or 2 S, and what the timestep makes has one.
    """
    passes.ShapeInferencePass()(model)
    context, time = cut(model, "context"), cut(model, "timestep")
    for value in (*model.graph.inputs, *time.graph.inputs, *time.graph.outputs):
        if value.name.startswith("timestep"):
            value.shape = onnx_ir.Shape([1, *value.shape[1:]])
    share_halves(model)
    return context, time


def plain_attention(model: onnx_ir.Model) -> None:
    """Softmax attention without a mask, with one transpose a head's tensor and the scale at one place."""
    for softmax in nodes(model, "Softmax"):
        scores, product = softmax.inputs[0].producer(), only_user(softmax)
        merged = only_user(only_user(product))
        if scores is None or scores.op_type != "MatMul" or product is None or merged is None:
            continue
        query = back(scores.inputs[0], ["Mul", *HEADS_OUT])
        key = back(scores.inputs[1], ["Mul", "Reshape", "Transpose", "Reshape", *HEADS_OUT])
        value = back(product.inputs[1], HEADS_OUT)
        if None in (query, key, value) or merged.op_type != "Reshape":
            continue
        heads = product.outputs[0].shape[1]
        scale = np.prod([factor.producer().inputs[1].const_value.numpy() for factor in scores.inputs])
        factor = constant(model, f"attention.scale.{scale}", np.array(scale, np.float32))
        split = constant(model, f"attention.heads.{heads}", np.array([0, 0, heads, -1], np.int64))
        joined = constant(model, "attention.joined", np.array([0, 0, -1], np.int64))

        def transposed(x, *order, split=split):
            return add(model, "Transpose", [add(model, "Reshape", [x, split])], dict(perm=order))

        query = add(model, "Mul", [transposed(query, 0, 2, 1, 3), factor])
        weights = add(model, "MatMul", [query, transposed(key, 0, 2, 3, 1)])  # [N,H,S,L]
        weights = add(model, "Softmax", [weights], dict(axis=-1))
        attended = add(model, "MatMul", [weights, transposed(value, 0, 2, 1, 3)])  # [N,H,S,C/H]
        attended = add(model, "Transpose", [attended], dict(perm=(0, 2, 1, 3)))
        replace(merged, add(model, "Reshape", [attended, joined]))


def norms_by_channel(model: onnx_ir.Model) -> None:
    """Group norms of images [N,C,h,w] by way of each channel's average: no tensor of the image's size is regrouped."""
    for norm in nodes(model, "InstanceNormalization"):
        scaled = only_user(reshaped := only_user(norm))
        shifted = only_user(scaled)
        source = back(norm.inputs[0], ["Reshape"])
        if source is None or reshaped is None or scaled is None or shifted is None or len(source.shape) != 4:
            continue
        if [reshaped.op_type, scaled.op_type, shifted.op_type] != ["Reshape", "Mul", "Add"]:
            continue
        groups, channels = norm.inputs[1].shape[0], source.shape[1]
        epsilon = norm.attributes["epsilon"].value
        least = constant(model, f"norm.epsilon.{epsilon}", np.array(epsilon, np.float32))
        centred = add(model, "Sub", [source, group_average(model, source, groups, channels)])
        squares = add(model, "Mul", [centred, centred])
        variance = add(model, "Add", [group_average(model, squares, groups, channels), least])
        factor = add(model, "Div", [scaled.inputs[1], add(model, "Sqrt", [variance])])
        replace(shifted, add(model, "Add", [add(model, "Mul", [centred, factor]), shifted.inputs[1]]))


def group_average(model: onnx_ir.Model, x: onnx_ir.Value, groups: int, channels: int) -> onnx_ir.Value:
    """The mean of every channel's group: [N,C,h,w] -> [N,C,1,1]."""
    integers = lambda name, *values: constant(model, f"norm.{name}", np.array(values, np.int64))
    keep, each = dict(keepdims=1), channels // groups
    x = add(model, "ReduceMean", [x, integers("pixels", 2, 3)], keep)
    x = add(model, "Reshape", [x, integers(f"groups.{groups}", 0, groups, -1, 1)])
    x = add(model, "ReduceMean", [x, integers("members", 2)], keep)
    x = add(model, "Expand", [x, integers(f"each.{each}", 1, 1, each, 1)])
    return add(model, "Reshape", [x, integers(f"channels.{channels}", 0, channels, 1, 1)])
