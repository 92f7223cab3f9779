"""Which head is measured on which split, and what a run says of itself."""

import pytest

from grounded_diffusion.training.checkpoint import untrained_checkpoint
from grounded_diffusion.training.evaluation.table import Trained, line, seen_score
from grounded_diffusion.training.grounding.splits import Split, built_in_split


@pytest.fixture(scope="module")
def head(base):
    return untrained_checkpoint(base).head


def test_a_head_belongs_to_the_split_with_its_unseen_names(head):
    things, voc = built_in_split("things-64", 1), built_in_split("voc", 1)
    trained = Trained(head, {"seen": things.seen, "unseen": things.unseen})
    assert trained.fits(things)
    assert trained.fits(voc)  # the same unseen names, of fewer
    assert not trained.fits(built_in_split("voc", 2))
    assert not trained.fits(Split(("dog",), ("cat",)))
    assert not Trained(head, {}).fits(things)  # nobody knows what it was trained on


def test_thresholds_are_chosen_by_seen_names_alone():
    assert seen_score({"one_seen": 60.0, "two_seen": 40.0, "one_unseen": 99.0}) == 100.0
    assert seen_score({"one_unseen": 99.0}) == 0.0


def test_a_row_in_words():
    assert line({"one_seen": 90.0, "one_seen.images": 3, "one_seen.per_mask": 91.0}) == "one_seen 90.0"
    assert line({}) == "no image counts"
