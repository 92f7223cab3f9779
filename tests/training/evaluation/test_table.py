"""Which head is measured on which split, and what a run says of itself."""

import pytest

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.checkpoint import save_checkpoint, untrained_checkpoint
from grounded_diffusion.training.evaluation import cli
from grounded_diffusion.training.evaluation.asked import read_splits, trained_heads
from grounded_diffusion.training.evaluation.protocol1 import TestSize
from grounded_diffusion.training.evaluation.table import Plan, Trained, line, seen_score
from grounded_diffusion.training.grounding.config import PRESETS
from grounded_diffusion.training.grounding.splits import Split, built_in_split
from grounded_diffusion.training.things.world import NAMES


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


def test_every_split_has_the_head_that_was_kept_from_its_names(head):
    splits = {f"split{n}": built_in_split("voc", n) for n in (1, 2, 3)}
    of = lambda split: Trained(head, {"seen": split.seen, "unseen": split.unseen})
    plan = Plan(
        "pascal", splits, TestSize(), PRESETS["quick"], 10, trained=(of(splits["split3"]), of(splits["split1"]))
    )
    assert plan.trained_for(splits["split1"]) is plan.trained[1]
    assert plan.trained_for(splits["split2"]) is None
    assert plan.trained_for(splits["split3"]) is plan.trained[0]


def test_a_vocabulary_on_renders_is_of_the_names_that_the_checkpoint_knows():
    asked = lambda *more: cli.build_parser().parse_args(["protocol1", "--vocabulary", "coco", *more, "--out", "x"])
    known = {"seen": ["aeroplane", "sofa", "dragon"], "unseen": ["cat"]}
    title, splits = read_splits(asked("--rendered"), known)
    assert title == "coco"
    assert (splits["split1"].seen, splits["split1"].unseen) == (("sofa",), ("aeroplane", "cat"))
    assert (splits["split3"].seen, splits["split3"].unseen) == (("aeroplane", "cat"), ("sofa",))
    _, splits = read_splits(asked("--rendered"), {})  # of no checkpoint: what scenes can show
    assert "backpack" in splits["split1"].seen
    assert "backpack" in NAMES
    _, splits = read_splits(asked(), known)
    assert len(splits["split1"].seen) == 65


def test_heads_of_another_model_are_refused(base, tmp_path):
    one = untrained_checkpoint(base)
    save_checkpoint(tmp_path / "one", one)
    assert len(trained_heads([tmp_path / "one", tmp_path / "one"])) == 2
    one.unet.conv_in.weight.data += 1
    save_checkpoint(tmp_path / "other", one)
    with pytest.raises(UsageError, match="other was trained on another model than"):
        trained_heads([tmp_path / "one", tmp_path / "other"])


def test_thresholds_are_chosen_by_seen_names_alone():
    assert seen_score({"one_seen": 60.0, "two_seen": 40.0, "one_unseen": 99.0}) == 100.0
    assert seen_score({"one_unseen": 99.0}) == 0.0


def test_a_row_in_words():
    assert line({"one_seen": 90.0, "one_seen.images": 3, "one_seen.per_mask": 91.0}) == "one_seen 90.0"
    assert line({}) == "no image counts"
