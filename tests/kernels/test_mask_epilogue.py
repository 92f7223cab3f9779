"""mask_epilogue on the host: its float64 reference, and torch's own upsampling."""

from __future__ import annotations

import numpy as np
import pytest

from grounded_diffusion import _kernels
from grounded_diffusion.kernels import MaskResult, mask_epilogue, reference
from grounded_diffusion.kernels.mask_epilogue import logit

SIZES = [((1, 1), (1, 1)), ((1, 1), (7, 13)), ((5, 3), (7, 13)), ((16, 16), (64, 64)), ((8, 9), (67, 129)),
         ((12, 20), (5, 6))]  # fmt: skip
FIELDS = ("labels", "masks", "area", "box", "score")
EDGE = 2e-6  # logits this near to the threshold or to each other may fall on either side in float32


def random_logits(batch: int, objects: int, low: tuple[int, int], seed: int = 0) -> np.ndarray:
    return 4.0 * np.random.default_rng(seed).standard_normal((batch, objects, *low), dtype=np.float32)


def decided(full: np.ndarray, threshold: float) -> np.ndarray:
    """bool [B, H, W]: pixels where no comparison hangs on the last bits."""
    ranked = np.sort(np.concatenate([full, np.full_like(full[:, :1], -np.inf)], axis=1), axis=1)
    gaps = np.diff(ranked, axis=1).min(axis=1)
    return (np.abs(full - logit(threshold)).min(axis=1) > EDGE) & (gaps > EDGE)


@pytest.mark.parametrize(("low", "size"), SIZES)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("objects", [1, 5])
def test_equals_reference(low, size, threshold, objects):
    logits = random_logits(3, objects, low)
    valid = np.ones((3, objects), np.bool_)
    valid[1, -1] = False
    expected = reference.mask_epilogue(logits, valid, size, threshold)
    assert decided(expected["logits"], threshold).all(), "this seed has a tie; choose another"
    got = mask_epilogue(logits, valid, size, threshold)
    for field in FIELDS[:-1]:
        np.testing.assert_array_equal(getattr(got, field), expected[field], err_msg=field)
        assert getattr(got, field).dtype == expected[field].dtype
    error = np.linalg.norm(got.score - expected["score"])
    assert got.score.dtype == np.float32
    assert error <= 1e-6 * np.linalg.norm(expected["score"])


@pytest.mark.parametrize(("low", "size"), SIZES)
def test_masks_are_torch_interpolate_thresholded(low, size):
    import torch

    logits = random_logits(2, 4, low, seed=1)
    full = torch.nn.functional.interpolate(torch.from_numpy(logits), size, mode="bilinear", align_corners=False).numpy()
    np.testing.assert_allclose(full, reference.upsample(logits, size), atol=2e-5)
    got = mask_epilogue(logits, np.ones((2, 4), np.bool_), size)
    sure = np.abs(full) > 1e-4
    np.testing.assert_array_equal(got.masks[sure], full[sure] > 0)


def test_poisoned_outputs_are_overwritten():
    logits, valid = random_logits(2, 3, (5, 4)), np.array([[True, False, True], [False, False, False]])
    expected = reference.mask_epilogue(logits, valid, (11, 9))
    for poison in (0x00, 0xFF):
        out = MaskResult.empty(2, 3, (11, 9))
        for field in FIELDS:
            getattr(out, field).view(np.uint8)[...] = poison
        _kernels.mask_epilogue(logits, valid, 0.0, out.labels, out.masks, out.area, out.box, out.score)
        for field in FIELDS:
            np.testing.assert_allclose(getattr(out, field), expected[field], rtol=1e-6, err_msg=field)


def test_overlap_goes_to_the_higher_logit_and_a_tie_to_the_first():
    logits = np.float32([[2, 1, 3, 3, -1], [1, 2, 3, 3, -2], [0, 0, 0, 4, -3]]).reshape(1, 3, 1, 5)
    got = mask_epilogue(logits, np.ones((1, 3), np.bool_), (1, 5), 0.5)
    assert got.labels.ravel().tolist() == [1, 2, 1, 3, 0]
    assert got.area.tolist() == [[4, 4, 1]]
    assert got.masks[0, 2, 0].tolist() == [False, False, False, True, False], "equal to the threshold is outside"


def test_an_invalid_object_does_not_hide_another():
    logits = np.full((1, 2, 2, 2), 5.0, np.float32)
    logits[0, 0] = 9.0
    got = mask_epilogue(logits, np.array([[False, True]]), (4, 4))
    assert (got.labels == 2).all()
    assert got.area.tolist() == [[0, 16]]
    assert got.box.tolist() == [[[0, 0, 0, 0], [0, 0, 4, 4]]]
    assert got.score[0, 0] == 0.0


def test_empty_and_not_a_number():
    logits = np.full((1, 2, 3, 3), -1.0, np.float32)
    logits[0, 1] = np.nan
    got = mask_epilogue(logits, np.ones((1, 2), np.bool_), (8, 8))
    assert not got.masks.any()
    assert not got.labels.any()
    assert not got.area.any()
    assert not got.box.any()
    assert not got.score.any()


def test_no_objects():
    got = mask_epilogue(np.empty((2, 0, 4, 4), np.float32), np.empty((2, 0), np.bool_), (8, 8))
    assert got.masks.shape == (2, 0, 8, 8)
    assert not got.labels.any()


def test_box_is_inclusive_of_both_edges():
    logits = np.full((1, 1, 6, 7), -9.0, np.float32)
    logits[0, 0, 2:5, 1:3] = 9.0
    got = mask_epilogue(logits, np.ones((1, 1), np.bool_), (6, 7))
    assert got.box[0, 0].tolist() == [1, 2, 2, 3]
    assert got.area[0, 0] == 6


@pytest.mark.parametrize("width", [1, 31, 32, 33])
def test_packed_bits(width):
    masks = np.random.default_rng(0).random((2, 3, 4, width)) < 0.5
    words = reference.pack_bits(masks)
    x = np.arange(width)
    assert words.shape == (2, 3, 4, -(-width // 32))
    assert words.dtype == np.uint32
    np.testing.assert_array_equal((words[..., x // 32] >> (x % 32).astype(np.uint32)) & 1, masks)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"logits": np.zeros((1, 2, 3, 3))}, TypeError, "logits must be float32, not float64"),
        ({"valid": np.ones((1, 2), np.uint8)}, TypeError, "valid must be bool, not uint8"),
        ({"valid": np.ones((2, 2), np.bool_)}, ValueError, r"valid must have shape \[1, 2\], not \[2, 2\]"),
        ({"size": (0, 4)}, ValueError, "size must lie between 1 and 16384"),
        ({"threshold": 1.0}, ValueError, "threshold must lie between 0 and 1, not 1.0"),
        ({"logits": np.zeros((1, 2, 0, 3), np.float32)}, ValueError, "at least one cell"),
    ],
)
def test_wrong_arguments_are_named(changes, error, says):
    given = dict(logits=np.zeros((1, 2, 3, 3), np.float32), valid=np.ones((1, 2), np.bool_), size=(4, 4), threshold=0.5)
    with pytest.raises(error, match=says):
        mask_epilogue(**(given | changes))
