"""UNets and decoder as OpenVINO runs them fastest, in standard operators: see `cpu` for ONNX Runtime's.

Shared with those are the two products of a GEGLU, upsampling inside its convolution, keys and values once a batch, and
halves of guidance that go together up to the first cross-attention. Different are

- attention: heads are split and merged by one transpose each, as OpenVINO's own fusion of attention wants them, and
  keys leave the context's graph transposed;
- group norms: scale, shift and SiLU run over channels-last memory, as convolutions read it. OpenVINO's kernels for them
  take a row at a time, and the 16 pixels of a 4x4 image are a short row;
- the timestep's embedding and its projections, which are the same for all images, are a graph of their own.

Winograd's convolutions are not here: in BF16 they lose what they win.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
from onnx_ir.passes import common as passes

from grounded_diffusion.export.cpu import HEADS_OUT, cut, fold_upsampling, share_halves, split_geglu
from grounded_diffusion.export.rewrites.nodes import add, back, constant, nodes, only_user, replace

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels of an image: last, and first again


def for_openvino(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 UNet with the rewrites of single layers; weights are shared."""
    model = decoder_for_openvino(model)
    plain_attention(model)
    split_geglu(model)
    norms_last(model)
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return model


def decoder_for_openvino(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy of an FP32 decoder; its images are large, so that its norms stay as they are."""
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


def norms_last(model: onnx_ir.Model) -> None:
    """Scale, shift and SiLU of a group norm over [N,h,w,C]; the transposes merge with the reorders around them."""
    for norm in nodes(model, "InstanceNormalization"):
        scaled = only_user(reshaped := only_user(norm))
        shifted = only_user(scaled)
        if reshaped is None or scaled is None or shifted is None:
            continue
        if [reshaped.op_type, scaled.op_type, shifted.op_type] != ["Reshape", "Mul", "Add"]:
            continue
        users = set(shifted.outputs[0].consumers())
        product = next((node for node in users if node.op_type == "Mul"), None)
        if len(users) != 2 or {node.op_type for node in users} != {"Sigmoid", "Mul"}:
            continue
        names = [f"{norm.outputs[0].name}.{part}" for part in ("scale", "shift")]
        vectors = [node.inputs[1].const_value.numpy().reshape(-1) for node in (scaled, shifted)]
        scale, shift = (constant(model, name, vector) for name, vector in zip(names, vectors, strict=True))
        last = add(model, "Transpose", [reshaped.outputs[0]], dict(perm=LAST))
        y = add(model, "Add", [add(model, "Mul", [last, scale]), shift])
        silu = add(model, "Mul", [y, add(model, "Sigmoid", [y])])
        replace(product, add(model, "Transpose", [silu], dict(perm=FIRST)))
