"""Groups, pooled and averaged figures, exchanged masks, absent names."""

import pytest
import torch

from grounded_diffusion.training.evaluation.protocol1 import average, fewer_pairs, stranger
from grounded_diffusion.training.evaluation.tally import Tally, group_of, iou
from grounded_diffusion.training.grounding.splits import Split, built_in_split

SEEN = frozenset({"dog", "cat"})


def mask(*rows):
    """bool [4,4] with these rows full."""
    found = torch.zeros(4, 4, dtype=torch.bool)
    found[list(rows)] = True
    return found


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["dog"], "one_seen"),
        (["deer"], "one_unseen"),
        (["dog", "cat"], "two_seen"),
        (["deer", "cat"], "two_mixed"),
        (["deer", "car"], "two_unseen"),
        (["dog", "cat", "car"], None),
    ],
)
def test_images_are_grouped_by_how_many_names_are_seen(names, group):
    assert group_of(names, SEEN) == group


def test_a_class_is_pooled_and_masks_are_averaged_beside_it():
    tally = Tally(SEEN)
    tally.add(0, ["dog"], mask(0)[None], mask(0, 1, 2, 3)[None])
    tally.add(1, ["dog"], mask(0)[None], mask(0)[None])
    figures = tally.figures()
    assert figures["one_seen"] == 40.0  # 8 pixels of 20
    assert figures["one_seen.per_mask"] == 62.5
    assert figures["one_seen.images"] == 2
    assert tally.by_name() == {"dog": 40.0}
    assert "one_unseen" not in figures


def test_masks_that_are_exchanged_are_counted():
    tally = Tally(SEEN)
    truth = torch.stack([mask(0), mask(1)])
    tally.add(0, ["dog", "cat"], truth, truth)
    tally.add(1, ["dog", "deer"], truth.flip(0), truth)
    assert tally.figures()["swap_rate"] == 50.0
    assert tally.figures()["two_mixed"] == 0.0


def test_the_area_of_absent_names():
    tally = Tally(SEEN)
    tally.add_absent(mask(0))
    tally.add_absent(mask())
    assert tally.figures() == {"absent_area": 12.5}


def test_two_empty_masks_are_the_same():
    assert iou(mask(), mask()) == 1.0
    assert iou(mask(0), mask()) == 0.0


def test_an_absent_name_is_never_in_the_image():
    names = ("dog", "cat", "car")
    assert {stranger(("dog",), names, k) for k in range(6)} == {"cat", "car"}
    assert {stranger(("dog", "cat"), names, k) for k in range(6)} == {"car"}


def test_splits_are_averaged_and_images_added():
    tables = [{"one_seen": 90.0, "one_seen.images": 10, "two_seen": 1.0}, {"one_seen": 80.0, "one_seen.images": 5}]
    assert average(tables) == {"one_seen": 85.0, "one_seen.images": 15, "two_seen": 1.0}  # of the split that has it


def test_fewer_pairs_are_the_same_for_all_splits():
    splits = {f"split{n}": built_in_split("voc", n) for n in (1, 2, 3)}
    fewer = fewer_pairs(splits, 30)
    assert {split.pairs for split in fewer.values()} == {fewer["split1"].pairs}
    assert len(set(fewer["split1"].pairs)) == 30
    for split in fewer.values():
        assert any(set(pair) <= set(split.unseen) for pair in split.pairs)
    assert fewer_pairs(splits, 0) == splits
    assert fewer_pairs({"a": Split(("dog", "cat"), (), (("dog", "cat"),))}, 5)["a"].pairs == (("dog", "cat"),)
