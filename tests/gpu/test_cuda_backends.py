"""Backends on a GPU equal the pipeline on the CPU. Needs an NVIDIA GPU; tests/gpu/run.py checks."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers.errors import relative_l2

from grounded_diffusion.bundle import FP8, GRAPHS, UNET, open_bundle, write_manifest
from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.open import open_backend
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, load_module
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.export.engine_cli import FIRST_FP8
from grounded_diffusion.export.engines import build_engines
from grounded_diffusion.export.quantize import fp8_bundle

PROMPTS = ["a [dog] and a [cat]", "a [unicorn]", "a [rocket] over the [sea] and a [dog]", "a [dragon]", "a [dog]"]
OPTIONS = {"steps": 6, "batch": 2, "guidance_scale": 4.0}  # two full batches and a padded one
ALIKE = {"fp32": (50.0, 0.999), "fp16": (35.0, 0.99)}  # PSNR in dB, IoU
GRAPH_ERROR = {"fp32": 1e-4, "fp16": 4e-3}  # relative L2


def installed(package: str) -> bool:
    """Whether a package is there, and, of ONNX Runtime, its CUDA provider."""
    if package == "onnxruntime":
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return importlib.util.find_spec(package) is not None


def listed_by_rtx() -> bool:
    """Whether TensorRT-RTX builds for the GPU at hand; it does not for sm_90."""
    return (
        installed("tensorrt_rtx")
        and f"SM{CudaDevice().arch}" in load_module("tensorrt_rtx").ComputeCapability.__members__
    )


BACKENDS = [
    *(["cuda"] if installed("onnxruntime") else []),
    *(["tensorrt"] if installed("tensorrt") else []),
    *(["tensorrt-rtx"] if listed_by_rtx() else []),
]


@pytest.fixture(scope="module", params=["tiny", "half"])
def bundle(request, tmp_path_factory):
    """The tiny bundle in FP32 or FP16, with engines of every backend that is installed, for batches of 1 and 2."""
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    shutil.copytree(request.getfixturevalue(f"{request.param}_bundle"), path)
    for name in set(BACKENDS) - {"cuda"}:
        sm = CudaDevice().arch if name == "tensorrt-rtx" else None
        buckets = [Bucket(batch, guided=guided) for batch in (1, 2) for guided in (True, False)]
        build_engines(open_bundle(path), name.replace("-", "_"), sms=[sm], buckets=buckets)
    return open_bundle(path)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"cuda"}))
def test_unets_in_fp8_are_close_to_their_simulation(half_bundle, tmp_path, name):
    if CudaDevice().arch < FIRST_FP8:
        pytest.skip("this GPU has no FP8")
    path = tmp_path / "bundle"
    shutil.copytree(half_bundle, path)
    write_manifest(path, replace(open_bundle(path).manifest, sampling={"steps": 2}))
    fp8_bundle(path)
    bundle, rng = open_bundle(path), np.random.default_rng(0)
    sm = CudaDevice().arch if name == "tensorrt-rtx" else None
    build_engines(bundle, name.replace("-", "_"), sms=[sm], buckets=[Bucket(2)], variant=FP8)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    context = draw(4, bundle.manifest.context_length, bundle.manifest.context_dim)
    inputs = {"latents": draw(2, 4, 16, 16), "timestep": np.full(2, 500, np.float32), "context": context}
    backend = open_backend(f"{name}-fp8", bundle)
    simulated = OnnxRuntimeBackend(bundle, variant=FP8).run(UNET, inputs)["model_output"]
    assert (
        relative_l2(backend.run(UNET, inputs)["model_output"], simulated) < 0.1
    )  # roundings to FP8 that fall otherwise
    backend.close()


@pytest.fixture(scope="module")
def expected(bundle):
    return list(GroundedPipeline(bundle, open_backend("onnxruntime", bundle)).generate(PROMPTS, **OPTIONS))


def test_a_backend_ran():
    assert BACKENDS, "no backend is installed that runs on this GPU; see docs/gpu.md"


def assert_alike(made, expected, precision):
    psnr, iou = ALIKE[precision]
    for one, other in zip(made, expected, strict=True):
        error = np.mean((one.image.astype(np.float64) - other.image) ** 2)
        assert error == 0 or 10 * np.log10(255**2 / error) >= psnr
        for name, mask in other.masks.items():
            both, either = (one.masks[name] & mask).sum(), (one.masks[name] | mask).sum()
            assert not either or both / either >= iou


@pytest.mark.parametrize("replay", ["none", "step", "loop"])
@pytest.mark.parametrize("name", BACKENDS)
def test_it_equals_the_pipeline_on_the_cpu(bundle, expected, name, replay):
    backend = open_backend(name, bundle, replay=replay)
    pipe = GroundedPipeline(bundle, backend)
    for _ in range(2):  # the second time everything is replayed
        assert_alike(pipe.generate(PROMPTS, **OPTIONS), expected, bundle.manifest.precision)
    backend.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_stochastic_and_multistep_samplers(bundle, name):
    host, backend = open_backend("onnxruntime", bundle), open_backend(name, bundle)
    for options in ({"sampler": "lcm", "steps": 3}, {"sampler": "pndm"}, {"guidance_interval": (0.0, 1.0)}):
        given = OPTIONS | options
        wanted = list(GroundedPipeline(bundle, host).generate(PROMPTS[:2], **given))
        made = GroundedPipeline(bundle, backend).generate(PROMPTS[:2], **given)
        assert_alike(made, wanted, bundle.manifest.precision)
    backend.close()


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_graph_equals_the_cpu(bundle, name, graph):
    manifest, rng = bundle.manifest, np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    length, width = manifest.context_length, manifest.context_dim
    inputs = {
        "text_encoder.onnx": {"input_ids": rng.integers(3, 500, (2, length))},
        "vae_decoder.onnx": {"latents": draw(2, 4, 16, 16)},
    }.get(graph)
    if inputs is None:
        inputs = {"latents": draw(2, 4, 16, 16), "timestep": np.full(2, 500, np.float32)}  # both halves see them
        inputs |= {"context": draw(4, length, width)}
        if graph == "unet_grounded.onnx":
            inputs |= {"queries": draw(2, 8, width), "query_valid": np.ones((2, 8), np.bool_)}
    backend = open_backend(name, bundle)
    for key, value in open_backend("onnxruntime", bundle).run(graph, inputs).items():
        made = backend.run(graph, inputs)[key]
        assert relative_l2(made, value) <= GRAPH_ERROR[bundle.manifest.precision], key
    backend.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_noise_that_is_not_finite_is_named(bundle, name):
    backend = open_backend(name, bundle)
    noise = np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32)
    noise[1, 0, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="sample 1: the latents at step 1 of 6 are not finite"):
        list(GroundedPipeline(bundle, backend).generate(PROMPTS[:2], noise=noise, **OPTIONS))
    backend.close()


def test_the_warning_of_a_smaller_batch_is_not_given_without_need(bundle, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in BACKENDS:
            backend = open_backend(name, bundle)
            made = GroundedPipeline(bundle, backend).generate(PROMPTS, **OPTIONS)
            assert_alike(made, expected, bundle.manifest.precision)
            backend.close()
