"""Filters: each condition's edge, its reason, and near-duplicates that do not depend on the machine."""

import argparse
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import samples

from grounded_diffusion.engine.cli.options import add_filter_options, filters_of
from grounded_diffusion.engine.runs.filters import Filters, difference_hash
from grounded_diffusion.errors import UsageError

SIZE = 40  # pixels a side; 1600 in all


def sample(index=0, image=None, **areas):
    """A sample whose masks are the first `area` pixels each, so that each lies within the larger ones."""
    masks = {name: (np.arange(SIZE * SIZE) < area).reshape(SIZE, SIZE) for name, area in areas.items()}
    if image is None:
        image = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return samples.sample(index, image, masks, score=0.5)


@pytest.mark.parametrize(
    ("settings", "areas", "reason"),
    [
        ({}, dict(dog=0, cat=1600), None),
        ({"require_masks": True}, dict(dog=160, cat=0), "no mask of cat"),
        ({"require_masks": True}, dict(dog=1, cat=1), None),
        ({"min_area": 0.1}, dict(dog=160, cat=159), "area of cat"),
        ({"min_area": 0.1}, dict(dog=160, cat=0), None),
        ({"max_area": 0.5}, dict(dog=800), None),
        ({"max_area": 0.5}, dict(dog=801), "area of dog"),
        ({"max_area": 0.0}, dict(dog=1), "area of dog"),
        ({"min_score": 0.5}, dict(dog=100, cat=0), None),
        ({"min_score": 0.51}, dict(dog=100), "score of dog"),
        ({"max_overlap": 0.99}, dict(dog=100, cat=200), "overlap of dog and cat"),
        ({"max_overlap": 1.0}, dict(dog=100, cat=200), None),
        ({"max_overlap": 0.0}, dict(dog=100, cat=0), None),
        ({"require_masks": True, "min_area": 0.5}, dict(dog=10, cat=0), "area of dog"),
    ],
)
def test_conditions(settings, areas, reason):
    assert Filters(**settings).checker().check(sample(**areas)) == reason


def test_masks_that_overlap_in_part():
    one, other = np.zeros((SIZE, SIZE), bool), np.zeros((SIZE, SIZE), bool)
    one[:10, :10], other[:10, 6:36] = True, True  # 40 of the smaller one's 100 pixels
    pair = replace(sample(dog=100, cat=300), objects=samples.object_masks({"dog": one, "cat": other}, 0.5))
    assert Filters(max_overlap=0.4).checker().check(pair) is None
    assert Filters(max_overlap=0.39).checker().check(pair) == "overlap of dog and cat"


def test_near_duplicates_of_accepted_samples_only():
    checker = Filters(min_distance=4, require_masks=True).checker()
    image = sample(5, dog=1).image
    noisy = np.clip(image.astype(int) + np.random.default_rng(0).integers(-2, 3, image.shape), 0, 255).astype(np.uint8)
    assert (difference_hash(image) ^ difference_hash(noisy)).bit_count() < 4
    assert checker.check(sample(4, image, dog=0)) == "no mask of dog"
    assert checker.check(sample(5, image, dog=1)) is None
    assert checker.check(sample(6, noisy, dog=1)) == "duplicate of 000005"
    assert checker.check(sample(7, dog=1)) is None
    assert Filters(min_distance=4).checker().check(sample(6, noisy, dog=1)) is None


def test_the_hash_is_that_of_exact_cell_means():
    from fractions import Fraction

    image = np.random.default_rng(3).integers(0, 256, (19, 31, 3), np.uint8)
    expected = 0
    for row in range(8):
        means = []
        for column in range(9):
            cell = image[row * 19 // 8 : (row + 1) * 19 // 8, column * 31 // 9 : (column + 1) * 31 // 9].astype(int)
            luma = (cell * [299, 587, 114]).sum()
            means.append(Fraction(int(luma), cell.shape[0] * cell.shape[1]))
        for left, right in pairwise(means):
            expected = expected << 1 | (right > left)
    assert difference_hash(image) == expected
    assert difference_hash(np.full((64, 64, 3), 200, np.uint8)) == 0
    ramp = np.broadcast_to(np.arange(72, dtype=np.uint8)[:, None], (64, 72, 3))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(255 - ramp) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_area": -0.1}, "min_area must be a share from 0 to 1, not -0.1"),
        ({"max_overlap": float("nan")}, "max_overlap must be a share"),
        ({"min_area": 0.5, "max_area": 0.4}, "nothing would pass"),
        ({"min_distance": 65}, "min_distance must be from 1 to 64 bits, not 65"),
    ],
)
def test_bad_bounds(settings, message):
    with pytest.raises(UsageError, match=message):
        Filters(**settings)


def test_options():
    parser = argparse.ArgumentParser()
    add_filter_options(parser)
    assert filters_of(parser.parse_args([])) == Filters()
    given = "--require-masks --min-area 0.1 --max-area 0.9 --min-score 0.6 --max-overlap 0.3 --min-distance 4"
    given += " --min-presence 0.5"
    settings = dict(
        require_masks=True, min_area=0.1, max_area=0.9, min_score=0.6, max_overlap=0.3, min_distance=4,
            min_presence=0.5,
    )  # fmt: skip
    assert asdict(filters_of(parser.parse_args(given.split()))) == settings
