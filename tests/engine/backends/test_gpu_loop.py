"""The device loop, executed on a device made of host memory, gives what the NumPy loop gives.

`test_gpu_driver.py` runs all of this again on the real CudaDevice.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
from helpers.cuda.device import FakeDriverDevice
from helpers.fake_gpu import HostDevice, HostRuntime

from grounded_diffusion.bundle import GPU, UNET, UNET_GROUNDED, VAE_DECODER, open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.gpu.backend import DeviceBackend
from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.engine.backends.open import open_backend
from grounded_diffusion.engine.sampling import batch
from grounded_diffusion.engine.sampling.batch import BatchRequest
from grounded_diffusion.engine.sampling.denoise import make_batch
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.errors import BackendError, NumericsError, UsageError


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    return GroundedPipeline(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.fixture
def open_device(request, pipe):
    """Opens a backend on a device of host memory; nothing that a GPU would punish may have been done to it."""
    device_class = FakeDriverDevice if request.config.getoption("--fake-driver") else HostDevice
    always = tuple(range(4)) if request.config.getoption("--eager-streams") else ()
    devices = []

    def open_device(replay="step", memory=1 << 40, buckets=None, eager=always):
        devices.append(device_class(memory, eager))
        return DeviceBackend(pipe.bundle, devices[-1], HostRuntime(pipe.bundle, devices[-1], buckets), replay)

    yield open_device
    assert not [complaint for device in devices for complaint in getattr(device, "complaints", [])]


PROMPTS = ["a [dog] and a [cat]", "a [unicorn]", "a [rocket] over the [sea] and a [dog]", "a [dragon]", "a [dog]"]


def request(pipe, count=3, draw=0, **changes):
    """A request of `count` images, made as the pipeline makes one."""
    from grounded_diffusion.engine.prompts.prompt import as_prompts

    given = {"sampler": "ddim", "steps": 5, "guidance_scale": 4.0, "guidance_interval": (0.0, 1.0)}
    options = Options(**(given | changes))
    schedule, shape = pipe.schedule(options), pipe.latent_shape(options)
    keys = [(7, draw + i) for i in range(count)]
    return BatchRequest(
        schedule=schedule,
        conditioning=pipe.condition(list(as_prompts(PROMPTS[:count]))),
        noise=batch_normal(keys, shape),
        size=options.image_size(pipe.bundle.manifest),
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        capture=schedule.capture_index(pipe.bundle.manifest.capture_timestep),
        step_noise=lambda row: batch_normal(keys, shape, row + 1),
        threshold=options.threshold,
    )


def assert_same(made, expected):
    """Two batches agree, but for roundings of a network that runs at another batch size."""
    masks, denoised = expected.masks, expected.denoised
    assert made.images.shape == expected.images.shape and made.masks.masks.shape == masks.masks.shape
    np.testing.assert_allclose(made.denoised.latents, denoised.latents, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made.denoised.mask_logits, denoised.mask_logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(made.denoised.captured, denoised.captured, rtol=1e-3, atol=1e-3)  # in FP16, halves
    assert made.denoised.capture_timestep == denoised.capture_timestep
    assert np.abs(made.images.astype(int) - expected.images).max() <= 1
    assert (made.masks.masks == masks.masks).mean() > 0.999 and (made.masks.labels == masks.labels).mean() > 0.999
    assert np.abs(made.masks.area - masks.area).max() <= 4
    np.testing.assert_allclose(made.masks.score, masks.score, atol=1e-3)


@pytest.mark.parametrize(
    ("replay", "options", "captures"),
    [
        ("none", {}, 0),
        ("step", {}, 2),  # plain, and the captured last step
        ("loop", {}, 1),
        ("step", {"sampler": "pndm"}, 2),
        ("loop", {"sampler": "euler", "steps": 3}, 1),
        ("step", {"sampler": "dpmpp-2m", "guidance_interval": (0.2, 0.7)}, 3),
        ("loop", {"sampler": "lcm", "steps": 2, "guidance_scale": 1.0}, 2),  # steps: noise is not captured
    ],
)
def test_it_equals_the_numpy_loop(pipe, open_device, replay, options, captures):
    backend = open_device(replay)
    requests = [request(pipe, draw=10 * i, **options) for i in range(3)]
    pending = [backend.submit(r) for r in requests]  # more than there are slots
    for waiting, r in reversed(list(zip(pending, requests, strict=True))):
        assert_same(waiting.result(), make_batch(pipe.backend, r))
    assert backend.device.captures == captures
    assert backend.device.replays == {"none": 0, "step": 3 * len(requests[0].schedule.rows)}.get(
        replay, 6 if requests[0].schedule.stochastic else 3
    )
    backend.close()
    assert not backend.device.used, "all memory is freed"


@pytest.mark.parametrize("eager", [(0,), (0, 1), (1, 2)], ids=["loop", "loop and decode", "decode and copy"])
def test_no_stream_runs_over_another(pipe, open_device, eager):
    backend = open_device(eager=eager)
    requests = [request(pipe, draw=10 * i, steps=2) for i in range(4)]
    pending = [backend.submit(r) for r in requests]
    for waiting, r in zip(pending, requests, strict=True):
        assert_same(waiting.result(), make_batch(pipe.backend, r))


def test_memory_is_freed_while_a_graph_runs(pipe, open_device, monkeypatch):
    """As Python's garbage collector may do at any time, in whichever thread it is then."""
    backend = open_device()
    run = backend.runtime.run

    def freeing(*args):
        assert backend.device.pinned(64).size == 64
        return run(*args)

    monkeypatch.setattr(backend.runtime, "run", freeing)
    r = request(pipe, 2, steps=3)
    assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))


def test_other_prompts_guidance_and_solver_replay_the_same_capture(pipe, open_device):
    backend = open_device()
    for changes in ({"guidance_scale": 2.0}, {"sampler": "dpmpp-2m", "steps": 3}, {"threshold": 0.3}):
        r = request(pipe, draw=5, **changes)
        assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))
    assert backend.device.captures == 2


def test_a_tail_is_padded_into_a_bucket_that_is_there(pipe, open_device):
    backend = open_device()
    for count in (4, 3, 1):
        r = request(pipe, count, steps=2)
        assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))
    assert [sizes.batch for sizes in backend._loops] == [4, 1]


def test_a_batch_is_split_over_the_engines_there_are(pipe, open_device):
    backend = open_device(buckets=[(2, 4), (2, 8), (1, 4)])
    r = request(pipe, 5, sampler="lcm", steps=2)
    assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))
    assert [(s.batch, s.objects) for s in backend._loops] == [(2, 4), (1, 4)]


def test_out_of_memory_goes_on_with_half_and_says_so(pipe, open_device):
    backend = open_device()
    backend.submit(request(pipe, 2, steps=2)).result()
    needed = backend.device.used
    backend = open_device(memory=needed)
    r = request(pipe, 4, steps=2)
    with pytest.warns(UserWarning, match=r"batch of 4 does not fit at 64x64 in the memory of host; going on with 2"):
        made = backend.submit(r).result()
    assert_same(made, make_batch(pipe.backend, r))
    assert [sizes.batch for sizes in backend._loops] == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.submit(r).result()  # remembered
    tiny = open_device(memory=1000)
    with pytest.raises(DeviceMemoryError, match=r"not even one image fits at 64x64 .*use a smaller --size"):
        tiny.submit(request(pipe, 1, steps=2)).result()
    large = open_device(memory=needed, buckets=[(4, 8)])
    with pytest.warns(UserWarning), pytest.raises(BackendError, match=r"no engine is small enough.*--batch 2"):
        large.submit(r).result()


def test_a_tail_that_does_not_fit_beside_a_full_batch_takes_its_place(pipe, open_device):
    backend = open_device()
    full, tail = request(pipe, 4, steps=2), request(pipe, 1, steps=2)
    backend.submit(full).result()
    backend = open_device(memory=backend.device.used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is halved
        for r in (full, tail, full):
            assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))
    assert [sizes.batch for sizes in backend._loops] == [4]


def test_images_are_decoded_in_parts(pipe, open_device, monkeypatch):
    r = request(pipe, 5, steps=2)
    whole = make_batch(pipe.backend, r).images
    monkeypatch.setattr(batch, "DECODE_CELLS", 2 * 16 * 16)
    backend, decoded = open_device(), []
    expected = make_batch(pipe.backend, r)
    assert np.abs(expected.images.astype(int) - whole).max() <= 1
    backend.runtime.spoil = lambda graph, arrays: decoded.append(arrays) if graph == VAE_DECODER else None
    assert_same(backend.submit(r).result(), expected)
    assert [len(arrays["image"]) for arrays in decoded] == [2, 2, 2], "the last one repeats an image"

    def spoil(graph, arrays):
        if graph == VAE_DECODER:
            decoded.append(arrays)
            arrays["image"][1, 0, 0, 0] = np.nan if len(decoded) == 6 else 0

    backend.runtime.spoil = spoil
    with pytest.raises(NumericsError, match="sample 4: the pixels are not finite"):
        backend.submit(r).result()


def test_a_closed_backend_is_gone_without_the_garbage_collector(pipe, open_device):
    backend = open_device()
    pending = backend.submit(request(pipe, 2, steps=2))
    assert len(pending.result().images) == 2
    gc.collect()
    gc.disable()
    try:
        (loop,) = backend._loops.values()
        held = [weakref.ref(launch) for launch in loop._bound.values()]
        del loop
        backend.close()
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("graph", "tensor", "call", "says"),
    [
        (UNET, "model_output", 2, "latents at step 2 of 4"),
        (UNET_GROUNDED, "mask_logits", 1, "mask logits at step 4 of 4"),
        (UNET_GROUNDED, "model_output", 1, "latents at step 4 of 4"),
        (VAE_DECODER, "image", 1, "pixels"),
    ],
)
def test_a_number_that_is_not_finite_is_named(pipe, open_device, graph, tensor, call, says):
    backend, calls = open_device(), []

    def spoil(ran, arrays):
        calls.append(ran)
        if ran == graph and calls.count(graph) == call:
            arrays[tensor][1, 0, 0, 0] = np.inf

    backend.runtime.spoil = spoil
    with pytest.raises(NumericsError, match=f"sample 1: the {says} are not finite"):
        backend.submit(request(pipe, 3, steps=4)).result()
    r = request(pipe, 3, steps=4)
    assert_same(backend.submit(r).result(), make_batch(pipe.backend, r))  # nothing of it is left


def test_the_pipeline_runs_on_a_device(pipe, open_device):
    backend = open_device()
    prompts, options = PROMPTS, {"steps": 2, "batch": 2, "guidance_scale": 3.0}
    expected = list(pipe.generate(prompts, **options))
    made = list(GroundedPipeline(pipe.bundle, backend).generate(prompts, **options))
    assert [s.prompt for s in made] == [s.prompt for s in expected]
    for one, other in zip(made, expected, strict=True):
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
        assert one.names == other.names
    calls = []

    def spoil(ran, arrays):
        calls.append(ran)
        if ran == UNET and calls.count(UNET) == 1:
            arrays["model_output"][1] = np.nan

    backend.runtime.spoil = spoil
    again = list(GroundedPipeline(pipe.bundle, backend).generate(prompts[:2], **options))  # each alone, after the NaN
    assert len(again) == 2 and np.abs(again[1].image.astype(int) - expected[1].image).max() <= 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "cuda",
            r"onnxruntime .* has no CUDA provider; pip uninstall -y onnxruntime .*, then pip install '.*\[cuda\]'",
        ),
        ("tensorrt", r"tensorrt cannot be imported .*; pip install 'grounded-diffusion\[tensorrt\]'"),
        ("tensorrt-rtx", r"tensorrt_rtx cannot be imported .*; pip install 'grounded-diffusion\[rtx\]'"),
    ],
)
def test_a_backend_that_is_not_installed_says_what_to_install(pipe, name, says, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=says):
        open_backend(name, pipe.bundle)


def test_a_bundle_without_graphs_for_a_gpu_is_refused(pipe):
    files = {name: digest for name, digest in pipe.bundle.manifest.files.items() if not name.startswith(GPU)}
    old = replace(pipe.bundle, manifest=replace(pipe.bundle.manifest, files=files))
    device = HostDevice()
    with pytest.raises(BackendError, match="has no graphs for a GPU, an earlier version made it; run gd-export again"):
        DeviceBackend(old, device, HostRuntime(old, device))


def test_a_machine_without_a_gpu_is_told_so(pipe, monkeypatch):
    import cuda.core

    def no_driver(number):
        raise RuntimeError("the driver is not there")

    monkeypatch.setattr(cuda.core, "Device", no_driver)
    with pytest.raises(BackendError, match=r"no CUDA device 0 .*the driver is not there.*check nvidia-smi"):
        open_backend("tensorrt-rtx", pipe.bundle)
    with pytest.raises(UsageError, match="no backend 'directml'; choose one of onnxruntime, openvino"):
        open_backend("directml", pipe.bundle)
