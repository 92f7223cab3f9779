"""image_epilogue on the host: its reference, and diffusers itself."""

from __future__ import annotations

import numpy as np
import pytest

from grounded_diffusion.kernels import image_epilogue, reference


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 13), (3, 31, 33), (1, 64, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_equals_reference_over_poison(shape, dtype):
    batch, height, width = shape
    image = (np.random.default_rng(0).standard_normal((batch, 3, height, width)) * 0.8).astype(dtype)
    expected = reference.image_epilogue(image)
    for poison in (0, 255):
        out = np.full((batch, height, width, 3), poison, np.uint8)
        assert image_epilogue(image, out) is out
        np.testing.assert_array_equal(out, expected)


def test_equals_diffusers():
    import torch
    from diffusers.image_processor import VaeImageProcessor

    image = np.random.default_rng(1).uniform(-1.2, 1.2, (2, 3, 37, 41)).astype(np.float32)
    pictures = VaeImageProcessor().postprocess(torch.from_numpy(image), output_type="pil")
    np.testing.assert_array_equal(image_epilogue(image), np.stack([np.asarray(p) for p in pictures]))


def test_halves_round_to_even_and_every_byte_is_reached():
    """The floats next to and at every rounding boundary, where another rounding rule would show."""
    boundary = np.float32((np.arange(256) + 0.5) / 255 * 2 - 1)
    level = np.float32(np.arange(256) / 255 * 2 - 1)
    near = np.concatenate(
        [level, boundary, np.nextafter(boundary, np.float32(-2)), np.nextafter(boundary, np.float32(2))]
    )
    image = np.broadcast_to(near, (1, 3, 1, near.size)).copy()
    out = image_epilogue(image)
    np.testing.assert_array_equal(out, reference.image_epilogue(image))
    assert set(out.ravel()) == set(range(256))


def test_every_half_precision_value():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    image = np.broadcast_to(every, (1, 3, 1, 65536)).copy()
    np.testing.assert_array_equal(image_epilogue(image), reference.image_epilogue(image))


def test_not_a_number_is_black():
    image = np.array([np.nan, np.inf, -np.inf], np.float32).reshape(1, 3, 1, 1)
    assert image_epilogue(image).ravel().tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("image", "error", "says"),
    [
        (np.zeros((1, 3, 2, 2)), TypeError, "image must be float32 or float16, not float64"),
        (
            np.zeros((1, 4, 2, 2), np.float32),
            ValueError,
            r"image must have shape \[\*, 3, \*, \*\], not \[1, 4, 2, 2\]",
        ),
        (np.zeros((1, 2, 2, 3), np.float32).transpose(0, 3, 1, 2), ValueError, "image must be C-contiguous"),
    ],
)
def test_wrong_arguments_are_named(image, error, says):
    with pytest.raises(error, match=says):
        image_epilogue(image)
