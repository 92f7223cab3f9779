"""UNets in 8 bits: made by gd-export --int8, run by gd-infer --precision int8."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from grounded_diffusion.bundle import INT8, TEXT_ENCODER, UNET, UNET_GROUNDED, open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.open import PRECISIONS, cpu_backends
from grounded_diffusion.engine.backends.openvino_cpu import OpenVinoBackend
from grounded_diffusion.engine.cli.infer import main as gd_infer
from grounded_diffusion.errors import BackendError
from grounded_diffusion.export import cli

pytest.importorskip("nncf")
APART = {"model_output": 0.2, "mask_logits": 0.8}  # a head of random weights makes much of little
PROMPT = json.dumps({"prompt": "a photograph of a dog and a cat", "objects": ["dog", "cat"]})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bundle(tiny_bundle, tmp_path_factory, cache):
    path = tmp_path_factory.mktemp("int8") / "bundle"
    shutil.copytree(tiny_bundle, path)
    assert cli.main(["--bundle", str(path), "--int8"]) == 0
    return path


def test_the_bundle_lists_its_unets_in_8_bits(bundle):
    opened = open_bundle(bundle, verify=True)
    made = {name for name in opened.manifest.files if name.startswith(INT8)}
    assert made == {f"{INT8}{graph}.{kind}" for graph in ("unet", "unet_grounded") for kind in ("xml", "bin")}
    assert not list(bundle.glob(".int8-*"))


def test_products_of_the_unets_are_of_8_bits(bundle):
    text = open_bundle(bundle).int8(UNET).read_text(encoding="utf-8")
    assert 'element_type="i8"' in text and "FakeQuantize" in text


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_unets_in_8_bits_are_close_to_those_in_fp32(bundle, graph):
    rng, opened = np.random.default_rng(0), open_bundle(bundle)
    manifest = opened.manifest
    ids = rng.integers(0, 600, (4, manifest.context_length))
    inputs = {
        "latents": rng.standard_normal((2, manifest.latent_channels, 16, 16)).astype(np.float32),
        "timestep": np.full(2, 501, np.float32),
        "context": OnnxRuntimeBackend(opened, 1).run(TEXT_ENCODER, {"input_ids": ids})["context"].copy(),
    }
    if graph == UNET_GROUNDED:
        inputs["queries"] = inputs["context"][:2, 1:3]
        inputs["query_valid"] = np.ones((2, 2), bool)
    exact, small = (OpenVinoBackend(opened, precision=p).run(graph, inputs) for p in ("fp32", "int8"))
    for name in exact:
        apart = np.linalg.norm(small[name] - exact[name]) / np.linalg.norm(exact[name])
        assert 1e-4 < apart < APART[name], name


def test_int8_has_to_be_asked_for(bundle, tmp_path):
    assert "int8" in PRECISIONS and cpu_backends("int8") == ["openvino-int8"]
    assert "openvino-int8" not in cpu_backends()
    (tmp_path / "prompts.txt").write_text("a photograph of a [dog]\n", encoding="utf-8")
    options = [
        "--model",
        bundle,
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "out",
        "--precision",
        "int8",
    ]
    assert gd_infer([*map(str, options), "--steps", "2", "--quiet"]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["backend"] == "openvino-int8"


def test_images_in_8_bits_show_the_same(bundle):
    images = []
    for backend in ("openvino", "openvino-int8"):
        with GroundedPipeline.open(bundle, backend=backend, threads=1) as pipe:
            images.append(next(iter(pipe.generate([PROMPT], Options(steps=4, seed=1)))).image.astype(float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 12


def test_a_bundle_without_them(tiny_bundle, cache):
    with pytest.raises(BackendError, match=r"has no UNets in int8; gd-export --bundle .* --int8 adds them"):
        OpenVinoBackend(open_bundle(tiny_bundle), precision="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16", "--int8", "--ckpt", "x", "--out", "y"], "--int8 is made of a model in fp32"),
        (["--bundle", "x"], "--bundle needs --engine, --int8 or --fp8"),
        (["--bundle", "nowhere", "--int8"], "there is no bundle at nowhere"),
    ],
)
def test_what_cannot_be_quantized(capsys, options, message):
    assert cli.main(options) == 2
    assert message in capsys.readouterr().err


def test_without_nncf(tiny_bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert cli.main(["--bundle", str(tiny_bundle), "--int8"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'grounded-diffusion[int8]'" in said and len(said.strip().splitlines()) == 1
