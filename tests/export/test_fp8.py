"""UNets in FP8: made by gd-export --fp8, simulated on ONNX Runtime, built by TensorRT-RTX; no GPU has run them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
from helpers.errors import relative_l2
from helpers.plans import fused_attentions
from onnx.numpy_helper import to_array

from grounded_diffusion.bundle import FP8, GPU, TEXT_ENCODER, UNET, UNET_GROUNDED, open_bundle, write_manifest
from grounded_diffusion.engine.backends.gpu.tensorrt import TensorRT
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, engine_spec
from grounded_diffusion.engine.backends.tensorrt.store import load_plan, read_sidecar
from grounded_diffusion.errors import BackendError
from grounded_diffusion.export import cli
from grounded_diffusion.export.graphs import Sizes, example_inputs
from grounded_diffusion.training.checkpoint import load_checkpoint

RTX = "tensorrt_rtx"
ATTENTIONS = 7  # transformer blocks of the tiny UNet: each has 8 products of the latents, and 2 attentions
APART = {"model_output": 0.1, "mask_logits": 0.4}  # relative L2: three bits of mantissa, and a head of random weights


@pytest.fixture(scope="module")
def bundle(half_bundle, tmp_path_factory):
    """The tiny bundle in FP16, of two steps, with UNets in FP8."""
    path = tmp_path_factory.mktemp("fp8") / "bundle"
    shutil.copytree(half_bundle, path)
    write_manifest(path, replace(open_bundle(path).manifest, sampling={"steps": 2}))
    assert cli.main(["--bundle", str(path), "--fp8"]) == 0
    return open_bundle(path)


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_products_of_the_unet_read_fp8(bundle, half_bundle, graph):
    model = onnx.load(bundle.variant(FP8, graph), load_external_data=False)
    weights = {t.name: t for t in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    quantized: dict[str, list[str]] = {"Conv": [], "MatMul": []}
    for node in model.graph.node:
        behind = [made[n] for n in node.input if n in made and made[n].op_type == "DequantizeLinear"]
        if not behind:
            continue
        given, weight = (made[dequantize.input[0]] for dequantize in behind)  # of nothing else, and both
        assert [given.op_type, weight.op_type] == ["QuantizeLinear"] * 2
        assert given.input[0] in made and weight.input[0] in weights
        for round_ in (given, weight):
            scale, zero = (weights[name] for name in round_.input[1:])
            assert zero.data_type == onnx.TensorProto.FLOAT8E4M3FN and scale.data_type == onnx.TensorProto.FLOAT16
            assert to_array(scale) > 0
        quantized[node.op_type].append(weight.input[0])
    assert len(quantized["MatMul"]) == 8 * ATTENTIONS
    assert len(quantized["Conv"]) > 20
    shapes = [list(weights[name].dims) for name in quantized["Conv"]]
    assert all(kernel == [3, 3] and not (d % 16 or c % 16) for d, c, *kernel in shapes)
    assert not [name for names in quantized.values() for name in names if "head" in name]
    assert {file for file in bundle.manifest.files if "weights" in file} == {p.name for p in half_bundle.glob("weig*")}


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_they_are_close_to_those_in_fp32(bundle, tiny_bundle, tiny_checkpoint, graph):
    inputs = example_inputs(load_checkpoint(tiny_checkpoint), graph, Sizes(2, 3, 16, 16), seed=2)
    given = {name: value.numpy() for name, value in inputs.items()}
    given |= {name: given[name][:2] for name in ("latents", "timestep")}
    exact = OnnxRuntimeBackend(open_bundle(tiny_bundle), 1, variant=GPU).run(graph, given)
    small = OnnxRuntimeBackend(bundle, 1, variant=FP8).run(graph, given)
    errors = {name: relative_l2(small[name], exact[name]) for name in exact}
    assert all(5e-3 < error < APART[name] for name, error in errors.items()), errors


def test_what_is_there_is_kept_and_engines_are_told_apart(bundle, capsys):
    assert cli.main(["--bundle", str(bundle.path), "--fp8"]) == 0
    assert not capsys.readouterr().out
    spec = lambda graph, variant: engine_spec(bundle, graph, RTX, 89, Bucket(1), variant)
    assert spec(UNET, FP8).key != spec(UNET, GPU).key
    assert (spec(UNET, FP8).precision, spec(UNET, GPU).precision) == ("fp8", "fp16")
    assert spec(TEXT_ENCODER, FP8) == spec(TEXT_ENCODER, GPU), "one engine serves both"
    open_for = lambda of: TensorRT(of, RTX, SimpleNamespace(name="GPU", arch=89), FP8)
    with pytest.raises(BackendError, match=r"has no engine of .*gd-export --bundle .* --sm 89 --fp8 --batch 2$"):
        open_for(bundle).buckets(2, 8, (64, 64))


def test_a_bundle_without_them_says_so(half_bundle):
    with pytest.raises(BackendError, match=r"has no UNets in fp8; gd-export --bundle .* --fp8 adds them"):
        TensorRT(open_bundle(half_bundle), RTX, SimpleNamespace(name="GPU", arch=89), FP8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp8", "--ckpt", "x", "--out", "y"], "--fp8 is made of a model in fp16; give --precision fp16"),
        (["--fp8", "--bundle", "nowhere"], "there is no bundle at nowhere"),
        (["--fp8", "--bundle", "x", "--engine", "tensorrt-rtx", "--sm", "86,89"], "--fp8 needs --sm 89 or above"),
    ],
)
def test_what_cannot_be_in_fp8(capsys, options, message):
    assert cli.main(options) == 2
    assert message in capsys.readouterr().err


def test_a_bundle_of_fp32_is_refused(tiny_bundle, capsys):
    assert cli.main(["--bundle", str(tiny_bundle), "--fp8"]) == 2
    assert "is of fp32; fp8 is made of a bundle of fp16" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("sm", [89, 120])
def test_tensorrt_rtx_builds_them(bundle, sm):
    """Weights take about half the memory that they take in FP16, and every attention is still one kernel."""
    memory = {}
    for options in (["--fp8"], []):
        command = ["--bundle", str(bundle.path), "--engine", "tensorrt-rtx", "--sm", str(sm), "--graph", UNET, *options]
        assert cli.main([*command, "--guided-only"]) == 0
        spec = engine_spec(bundle, UNET, RTX, sm, Bucket(1), FP8 if options else GPU)
        assert fused_attentions(load_plan(bundle.path, spec)) == 2 * ATTENTIONS
        memory[spec.precision] = read_sidecar(spec.directory(bundle.path)).memory
    assert 0.45 < memory["fp8"].weights / memory["fp16"].weights < 0.65
    if sm == 89:
        assert memory["fp8"].activations < 1.2 * memory["fp16"].activations
