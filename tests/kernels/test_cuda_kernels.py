"""CUDA kernels equal the host kernels and the float64 reference: on a GPU where there is one, and always on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.cuda.compile import FMA, build, sources
from helpers.cuda.kernels import CpuCudaKernels
from helpers.errors import relative_l2

from grounded_diffusion.kernels import StepCoefficients, cfg_step, image_epilogue, mask_epilogue, reference
from grounded_diffusion.kernels.cuda.device import DeviceArray, gpu_name
from grounded_diffusion.kernels.cuda.launch import STATS_BYTES, CudaKernels, MaskPointers, StepPointers, pack_step
from grounded_diffusion.kernels.mask_epilogue import logit

FP32, FP16 = 1e-6, 2e-3
SIZES = [(1, 1), (7, 13), (64, 64), (33, 65)]


@pytest.fixture(scope="module", params=["cpu", "cpu-fma", "cpu-reversed", *(["gpu"] if gpu_name() else [])])
def gpu(request, cuda_builds):
    """The kernels, a stream, and what puts an array into their memory."""
    if request.param == "gpu":
        kernels = CudaKernels()
        stream = kernels.device.create_stream()
        return kernels, stream, lambda array: DeviceArray(array, kernels.device, stream)
    flags = FMA if request.param == "cpu-fma" else ()
    library = request.config.getoption("--cuda-kernels") or build(cuda_builds, sources(), flags)
    kernels = CpuCudaKernels(library, reversed_=request.param == "cpu-reversed")
    return kernels, None, kernels.put


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [None, 7.5])
@pytest.mark.parametrize("half", [False, True])
def test_cfg_step(gpu, size, guidance, half):
    kernels, stream, put = gpu
    kind, tolerance = (np.float16, FP16) if half else (np.float32, FP32)
    shape = (3, 4, *size)
    output = random(1, 3 if guidance is None else 6, *shape[1:]).astype(kind)
    latents, history, noise = random(2, *shape), random(3, 3, *shape), random(4, *shape)
    step = StepCoefficients(
        guidance_scale=guidance, cx=0.4, co=0.9, a=1.013, b=[0.9, -0.3, 0.2, 0.1], head=1, n=0.3, next_scale=0.7
    )
    expected = reference.cfg_step(step, output, latents, history, noise)
    row = put(pack_step(step, slots=3).view(np.uint8))
    given = [put(v) for v in (output, latents, history, noise)]
    outputs = [put(np.full(shape, np.nan, np.float32)), put(np.full(shape, np.nan, kind))]
    at = StepPointers(
        coefficients=row.pointer, model_output=given[0].pointer, latents=given[1].pointer, history=given[2].pointer,
        noise=given[3].pointer, out_latents=outputs[0].pointer, out_input=outputs[1].pointer,
    )  # fmt: skip
    kernels.cfg_step(stream, at, count=latents.size, guided=guidance is not None, half=half)
    for value, wanted in zip((*outputs, given[2]), expected, strict=True):  # of the next input, the rows of one half
        assert relative_l2(value.numpy(), wanted[:3]) <= tolerance
    if not half:
        host = cfg_step(step, output, latents, history, noise=noise)
        for value, wanted in zip(outputs, host, strict=True):
            assert relative_l2(value.numpy(), wanted[:3]) <= tolerance


def test_numbers_that_are_not_finite_are_flagged_by_step_and_image(gpu):
    kernels, stream, put = gpu
    output, latents = random(1, 3, 4, 33, 65), random(2, 3, 4, 33, 65)
    image, logits = random(3, 3, 3, 7, 13), random(4, 3, 2, 5, 3)
    output[1, 3, 32, 64], image[2, 2, 6, 12], logits[0, 0, 4, 2], logits[1, 1, 0, 0] = np.inf, np.nan, np.nan, np.inf
    valid = np.array([[True, True], [True, False], [True, True]])  # the infinity is of no object
    row = put(pack_step(StepCoefficients(None, cx=0.0, co=1.0, a=1.0, b=[1.0]), row=4).view(np.uint8))
    flags = put(np.zeros((8, 3), np.uint8))
    given, after = [put(v) for v in (output, latents)], [put(latents), put(output)]
    at = StepPointers(
        row.pointer, given[0].pointer, given[1].pointer, after[0].pointer, after[1].pointer, bad=flags.pointer
    )
    kernels.cfg_step(stream, at, count=latents.size, guided=False, half=False, batch=3)
    picture, pixels = put(image), put(np.zeros((3, 7, 13, 3), np.uint8))
    kernels.image_epilogue(
        stream, picture.pointer, pixels.pointer, batch=3, size=(7, 13), half=False, bad=flags.pointer + 15
    )
    result = mask_epilogue(np.nan_to_num(logits), valid, (7, 13))
    outputs = [put(getattr(result, name).view(np.uint8)) for name in ("labels", "area", "box", "score")]
    stats, source, known = put(np.zeros(6 * STATS_BYTES, np.uint8)), put(logits), put(valid)
    at = MaskPointers(
        source.pointer, known.pointer, *(v.pointer for v in outputs), stats.pointer, bad=flags.pointer + 18
    )
    kernels.mask_epilogue(stream, at, shape=logits.shape, size=(7, 13), half=False)
    assert np.argwhere(flags.numpy()).tolist() == [[4, 1], [5, 2], [6, 0]]


def test_equal_logits_belong_to_the_first_object(gpu):
    kernels, stream, put = gpu
    logits = np.stack([np.full((2, 3), value, np.float32) for value in (-1.0, 2.0, 2.0, 1.0)])[None]
    logits[0, 3, 0, 0] = 2.5  # the last object wins where it is greater
    valid, size = np.ones((1, 4), np.bool_), (8, 12)
    host = mask_epilogue(logits, valid, size)
    assert set(np.unique(host.labels)) == {2, 4}
    outputs = {name: put(np.zeros_like(getattr(host, name))) for name in ("labels", "area", "box", "score")}
    given = {"logits": put(logits), "valid": put(valid), "stats": put(np.zeros(4 * STATS_BYTES, np.uint8))}
    at = MaskPointers(**{name: array.pointer for name, array in (given | outputs).items()})
    kernels.mask_epilogue(stream, at, shape=logits.shape, size=size, half=False)
    np.testing.assert_array_equal(outputs["labels"].numpy(), host.labels)


@pytest.mark.parametrize("size", [*SIZES, (512, 512)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_image_epilogue(gpu, size, dtype):
    kernels, stream, put = gpu
    image = (0.8 * random(0, 2, 3, *size)).astype(dtype)
    image[0, 0, 0, 0] = np.nan
    source, out = put(image), put(np.full((2, *size, 3), 77, np.uint8))
    kernels.image_epilogue(stream, source.pointer, out.pointer, batch=2, size=size, half=dtype == np.float16)
    # Fused multiply-add may move a value across a half: one level, rarely.
    difference = np.abs(out.numpy().astype(np.int16) - image_epilogue(image))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
    np.testing.assert_array_equal(image_epilogue(image), reference.image_epilogue(image))


@pytest.mark.parametrize(
    ("low", "size"), [((1, 1), (1, 1)), ((5, 3), (7, 13)), ((8, 9), (67, 129)), ((64, 64), (512, 512))]
)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("half", [False, True])
def test_mask_epilogue(gpu, low, size, threshold, half):
    kernels, stream, put = gpu
    logits = (4.0 * random(0, 2, 5, *low)).astype(np.float16 if half else np.float32)
    exact = logits.astype(np.float32)
    valid = np.ones((2, 5), np.bool_)
    valid[1, 2] = False
    host = mask_epilogue(exact, valid, size, threshold)
    full = reference.upsample(exact, size)
    words = -(-size[1] // 32)
    poison = [np.full_like(getattr(host, f).view(np.uint8), 0x5A) for f in ("labels", "masks", "area", "box", "score")]
    labels, masks, area, box, score = (put(p) for p in poison)
    bits = put(np.full((2, 5, size[0], words), 0xA5A5A5A5, np.uint32))
    stats = put(np.full(10 * STATS_BYTES, 0xFF, np.uint8))
    source, flags = put(logits), put(valid)
    at = MaskPointers(*(v.pointer for v in (source, flags, labels, area, box, score, stats, masks, bits)))
    kernels.mask_epilogue(stream, at, shape=logits.shape, size=size, threshold=threshold, half=half)
    got = masks.numpy().view(np.bool_)
    sure = np.abs(full - logit(threshold)) > 1e-5
    np.testing.assert_array_equal(got[sure], host.masks[sure])
    np.testing.assert_array_equal(bits.numpy(), reference.pack_bits(got))
    np.testing.assert_array_equal(area.numpy().view(np.int64), got.sum((2, 3)))
    clear = sure.all(axis=1) & (np.diff(np.sort(full, axis=1), axis=1).min(axis=1) > 1e-5)
    np.testing.assert_array_equal(labels.numpy()[clear], host.labels[clear])
    if (got == host.masks).all():
        np.testing.assert_array_equal(box.numpy().view(np.int32), host.box)
        assert relative_l2(score.numpy().view(np.float32), np.float64(host.score)) <= FP32
