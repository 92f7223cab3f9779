"""OpenVINO's backend on a tiny model, against ONNX Runtime: in FP32, in BF16, at odd sizes, from the cache."""

import os
import subprocess
import sys

import numpy as np
import pytest

from grounded_diffusion.bundle import (
    CONTEXT,
    GRAPHS,
    OPENVINO,
    TEXT_ENCODER,
    UNET,
    UNET_GROUNDED,
    VAE_DECODER,
    open_bundle,
)
from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.backends import openvino_cpu
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.open import cpu_backends, open_backend
from grounded_diffusion.engine.backends.openvino_cpu import OpenVinoBackend, chip_precisions, rounded
from grounded_diffusion.errors import BackendError

pytest.importorskip("openvino")
bf16 = pytest.mark.skipif("bf16" not in chip_precisions(), reason="this CPU has no bf16 instructions")
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of compiled models for the tests of this file."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def relative_l2(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def inputs(bundle, graph, images, objects=3, guided=True):
    """Random inputs; embeddings are the text encoder's own."""
    rng, manifest = np.random.default_rng(images), bundle.manifest
    ids = rng.integers(0, 600, (2 * images, manifest.context_length))
    with_ids = {"input_ids": ids[:images]}
    latents = {"latents": rng.standard_normal((images, 4, 16, 16), np.float32)}
    if graph in (TEXT_ENCODER, VAE_DECODER):
        return with_ids if graph == TEXT_ENCODER else latents
    context = OnnxRuntimeBackend(bundle, 1).run(TEXT_ENCODER, {"input_ids": ids})["context"].copy()
    unet = latents | {"timestep": np.full(images, 501, np.float32), "context": context[: images * (1 + guided)]}
    if graph == UNET:
        return unet
    valid = rng.random((images, objects)) > 0.3
    return unet | {"queries": context[:images, 1 : 1 + objects], "query_valid": valid | ~valid.any(1, keepdims=True)}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=bf16)])
@pytest.mark.parametrize("images", [1, 5])  # 5 are compiled as 6
def test_graphs_equal_onnxruntimes(tiny_bundle, cache, precision, images):
    bundle = open_bundle(tiny_bundle)
    exact, backend = OnnxRuntimeBackend(bundle, 1), OpenVinoBackend(bundle, 1, precision=precision)
    assert backend.name == f"openvino-{precision}"
    cases = [(graph, inputs(bundle, graph, images)) for graph in GRAPHS]
    for graph, given in [*cases, (UNET, inputs(bundle, UNET, images, guided=False))]:
        expected = {name: value.copy() for name, value in exact.run(graph, given).items()}
        actual = backend.run(graph, given)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name].dtype == np.float32
            assert actual[name].shape == value.shape
            assert relative_l2(actual[name], value) < TOLERANCE[precision], (graph, name)


def test_what_is_rounded_up_changes_nothing(tiny_bundle, cache):
    """Neither more images in the batch nor more objects."""
    bundle = open_bundle(tiny_bundle)
    backend, given = OpenVinoBackend(bundle, 1), inputs(bundle, UNET_GROUNDED, 5, objects=5)
    whole = {name: value.copy() for name, value in backend.run(UNET_GROUNDED, given).items()}
    assert whole["mask_logits"].shape[:2] == (5, 5)
    alone = {name: value[:1] for name, value in given.items() if name != "context"}
    alone = backend.run(UNET_GROUNDED, alone | {"context": given["context"][[0, 5]]})
    assert relative_l2(alone["mask_logits"], whole["mask_logits"][:1]) < 1e-6
    assert relative_l2(alone["model_output"], whole["model_output"][[0, 5]]) < 1e-6


def test_sizes_are_rounded_up_by_less_than_a_half():
    assert [rounded(count) for count in (1, 2, 3, 4, 5, 7, 9, 13, 16, 17, 32)] == [1, 2, 3, 4, 6, 8, 12, 16, 16, 24, 32]
    assert all(count <= rounded(count) < 1.5 * count for count in range(1, 257))


def test_a_new_context_makes_new_keys(tiny_bundle, cache):
    """Those of the batch before are kept only as long as its context comes again."""
    bundle = open_bundle(tiny_bundle)
    backend, given = OpenVinoBackend(bundle, 1), inputs(bundle, UNET, 2)
    first = backend.run(UNET, given)["model_output"].copy()
    other = backend.run(UNET, given | {"context": given["context"][::-1]})["model_output"].copy()
    assert not np.allclose(first, other)
    assert np.array_equal(backend.run(UNET, given)["model_output"], first)


def test_a_second_start_compiles_nothing(tiny_bundle, cache):
    bundle = open_bundle(tiny_bundle)
    given = inputs(bundle, UNET, 2)
    OpenVinoBackend(bundle, 1).run(UNET, given)
    again = OpenVinoBackend(bundle, 1)
    again.run(UNET, given)
    assert {key[0] for key in again._compiled} == {UNET, CONTEXT, openvino_cpu.TIME}
    assert all(compiled.model.get_property("LOADED_FROM_CACHE") for compiled in again._compiled.values())
    assert any((cache / "grounded-diffusion" / "openvino").iterdir())


def test_layers_run_in_the_precision_that_was_asked_for(tiny_bundle, cache):
    """No convolution or matrix product of the UNet is left in another, and attention is fused."""
    bundle = open_bundle(tiny_bundle)
    for precision in TOLERANCE.keys() & {*chip_precisions()}:  # int8 has graphs of its own, see test_quantize
        backend = OpenVinoBackend(bundle, 1, precision=precision)
        backend.run(UNET, inputs(bundle, UNET, 2))
        [compiled] = [compiled for (graph, _), compiled in backend._compiled.items() if graph == UNET]
        layers = [node.get_rt_info() for node in compiled.model.get_runtime_model().get_ops()]
        told = lambda layer, name: layer[name].astype(str)
        kinds = [told(layer, "layerType") for layer in layers if "layerType" in layer]
        products = {
            told(layer, "runtimePrecision")
            for layer in layers
            if told(layer, "layerType") in ("Convolution", "FullyConnected", "Deconvolution")
        }
        assert products == {openvino_cpu.PRECISIONS[precision]}
        assert "Softmax" not in kinds


@bf16
def test_pipeline_in_bf16(tiny_bundle, cache):
    """Several batches at once, the last one short, make the images that FP32 makes."""
    prompts = ["a photograph of a [dog] and a [cat]"] * 5
    made = {}
    for name in ("onnxruntime", "openvino-bf16"):
        with GroundedPipeline.open(tiny_bundle, backend=name, threads=2, lanes=2) as pipe:
            made[name] = list(pipe.generate(prompts, steps=3, batch=2))
    for exact, coarse in zip(*made.values(), strict=True):
        assert np.abs(exact.image.astype(int) - coarse.image).mean() < 4


def test_what_the_chip_or_the_machine_lacks(tiny_bundle, monkeypatch):
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(BackendError, match="this machine's CPU has no fp8 instructions"):
        OpenVinoBackend(bundle, 1, precision="fp8")
    missing = BackendError("openvino cannot be imported")
    monkeypatch.setattr(openvino_cpu, "load_openvino", lambda: (_ for _ in ()).throw(missing))
    assert chip_precisions() == ()
    assert cpu_backends() == ["onnxruntime"]
    with pytest.raises(BackendError, match="openvino cannot be imported"):
        open_backend("openvino", bundle)


def test_nothing_is_sent_home(tmp_path):
    """OpenVINO's own telemetry would leave an id in the home and report its import."""
    code = "import sys; from grounded_diffusion.engine.backends.openvino_cpu import load_openvino; load_openvino(); "
    code += "print([name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]])"
    env = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit(tiny_bundle, cache):
    bundle = open_bundle(tiny_bundle)
    backend, given = OpenVinoBackend(bundle, 1), inputs(bundle, UNET, 2)
    with pytest.raises(BackendError, match=r"takes .*'context'"):
        backend.run(UNET, {"latents": given["latents"]})
    with pytest.raises(BackendError, match="one timestep for all rows"):
        backend.run(UNET, given | {"timestep": np.array([1, 2], np.float32)})
    with pytest.raises(BackendError, match=r"openvino (failed in|cannot load) .*unet\.onnx"):
        backend.run(UNET, given | {"latents": given["latents"][:, :3]})
    assert f"{OPENVINO}{UNET}" in bundle.manifest.files
