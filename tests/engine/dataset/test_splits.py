"""Which samples are kept for validation: every class's share, in any order, and the same ones as a data set grows."""

import random
from collections import Counter

import pytest

from grounded_diffusion.engine.dataset.splits import Splitter
from grounded_diffusion.engine.prompts.vocabulary import COCO_NAMES, VOC_NAMES, VOC_PAIRS


def chosen(samples, share):
    """Indices of val."""
    splitter = Splitter(share)
    return [index for index, names in enumerate(samples) if splitter.in_val(index, names)]


def paper():
    """The paper's Algorithm 2 in the order of gd-prompts, with fewer images: each name, then each pair."""
    return [(name,) for name in VOC_NAMES for _ in range(200)] + [pair for pair in VOC_PAIRS for _ in range(20)]


def crowds():
    """One to four of COCO's names an image, drawn at random."""
    rng = random.Random(1)
    return [tuple(rng.sample(COCO_NAMES, rng.randint(1, 4))) for _ in range(6400)]


def shuffled():
    samples = paper()
    random.Random(2).shuffle(samples)
    return samples


@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
@pytest.mark.parametrize("samples", [paper(), shuffled(), crowds()], ids=["paper", "shuffled", "crowds"])
def test_every_class_has_its_share(samples, share):
    """Within three images, of which a class has hundreds."""
    val = chosen(samples, share)
    for name in {name for names in samples for name in names}:
        there = sum(name in names for names in samples)
        kept = sum(name in samples[index] for index in val)
        assert kept == pytest.approx(share * there, abs=3), name


def test_one_class_has_its_share_to_the_image():
    assert len(chosen([("dog",)] * 200, 0.1)) == 20


def test_a_class_is_one_whatever_the_case():
    assert len(chosen([("dog",), ("Dog",)] * 100, 0.1)) == 20


def test_what_comes_later_changes_nothing():
    samples = shuffled()
    assert chosen(samples[:1000], 0.1) == [index for index in chosen(samples, 0.1) if index < 1000]


def test_no_pattern_of_the_prompts_is_followed():
    """Of ten prompts in turn, each has about a tenth of its images in val."""
    counts = Counter(index % 10 for index in chosen([("dog",)] * 10_000, 0.1))
    assert sum(counts.values()) == 1000
    assert all(70 < counts[prompt] < 130 for prompt in range(10))


def test_images_without_objects_are_a_class_of_their_own():
    assert len(chosen([()] * 200, 0.1)) == 20
