"""Winograd's convolutions equal plain ones, at any size, in a graph of their own and in a UNet."""

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from helpers.errors import relative_l2
from torch.nn import functional as F

from grounded_diffusion.bundle import CPU, UNET
from grounded_diffusion.engine.backends.onnxruntime_cpu import WEIGHTS_FOLDER
from grounded_diffusion.export.rewrites import winograd as module
from grounded_diffusion.export.rewrites.winograd import matrices, winograd

rng = np.random.default_rng(0)


def session(model, folder="."):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    content = onnx_ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def graph(weight, bias, **geometry):
    """A model of one convolution, of images of any size."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["N", weight.shape[1], "h", "w"])
    constants = [
        onnx_ir.val(n, const_value=onnx_ir.tensor(a)) for n, a in (("w", weight), ("b", bias)) if a is not None
    ]
    conv = onnx_ir.node("Conv", [x, *constants], dict(strides=[1, 1], pads=[1, 1, 1, 1], dilations=[1, 1]) | geometry)
    y = conv.outputs[0]
    y.name, y.dtype, y.shape = "y", x.dtype, onnx_ir.Shape(["N", weight.shape[0], "h'", "w'"])
    made = onnx_ir.Graph([x], [y], nodes=[conv], initializers=constants, opset_imports={"": 20})
    return onnx_ir.Model(made, ir_version=10)


def operators(model):
    return {node.op_type for node in model.graph}


def test_four_sums_from_six_products():
    a, g, b = matrices()
    pixels, taps = rng.standard_normal(6), rng.standard_normal(3)
    expected = np.correlate(pixels, taps, "valid")
    assert np.abs(a @ ((g @ taps) * (b @ pixels)) - expected).max() < 1e-14


@pytest.mark.parametrize("biased", [True, False])
def test_equals_the_convolution(biased):
    weight = (rng.standard_normal((40, 64, 3, 3)) / 24).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32) if biased else None
    model = graph(weight, bias)
    winograd(model)
    assert "MatMul" in operators(model)
    run = session(model)
    for shape in [(1, 4, 4), (3, 8, 8), (2, 5, 7), (1, 1, 3), (2, 16, 4), (1, 13, 32)]:
        x = rng.standard_normal((shape[0], 64, *shape[1:])).astype(np.float32)
        tensors = [torch.from_numpy(v).double() if v is not None else None for v in (x, weight, bias)]
        expected = F.conv2d(*tensors, padding=1).numpy()
        (actual,) = run.run(None, {"x": x})
        assert actual.shape == expected.shape
        assert relative_l2(actual, expected) < 4e-6


@pytest.mark.parametrize(
    "shape, geometry",
    [
        ((64, 64, 1, 1), dict(pads=[0, 0, 0, 0])),
        ((64, 64, 3, 3), dict(strides=[2, 2])),
        ((64, 64, 3, 3), dict(dilations=[2, 2], pads=[2, 2, 2, 2])),
        ((64, 64, 3, 3), dict(pads=[0, 0, 0, 0])),
        ((64, 32, 3, 3), dict(group=2)),
        ((4, 64, 3, 3), {}),
        ((512, 512, 3, 3), {}),
    ],
)
def test_others_are_left_alone(shape, geometry):
    model = graph(np.zeros(shape, np.float32), None, **geometry)
    winograd(model)
    assert operators(model) == {"Conv"}


def test_a_unet_stays_the_same_function(tiny_bundle, monkeypatch):
    plain, rewritten = (onnx_ir.load(tiny_bundle / CPU / UNET) for _ in range(2))
    monkeypatch.setattr(module, "FEWEST_CHANNELS", 4)
    winograd(rewritten)
    kept = [node for node in rewritten.graph if node.op_type == "Conv" and node.inputs[1].shape[-1] == 3]
    assert len(kept) < len([node for node in plain.graph if node.op_type == "Conv"]) / 2
    sessions = session(plain, tiny_bundle), session(rewritten, tiny_bundle)
    for rows, height, width in [(1, 16, 16), (3, 8, 24)]:
        inputs = {}
        for value in sessions[0].get_inputs():
            count = rows if value.name in ("latents", "timestep") else 2 * rows
            spare = [height, width] if value.name == "latents" else []
            axes = [axis if isinstance(axis, int) else spare.pop(0) for axis in value.shape[1:]]
            inputs[value.name] = rng.standard_normal((count, *axes)).astype(np.float32)
        inputs["timestep"] = np.full(rows, 500, np.float32)
        expected, actual = (s.run(["model_output"], inputs)[0] for s in sessions)
        assert expected.shape == actual.shape == (2 * rows, 4, height, width)
        assert relative_l2(actual, expected) < 1e-5
