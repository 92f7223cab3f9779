"""Labels to names: spellings and synonyms, the nearest where there is none, and masks joined by name."""

import numpy as np
import pytest

from grounded_diffusion.engine.prompts.vocabulary import COCO_NAMES, VOC_NAMES
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.base import Detector, Instance
from grounded_diffusion.training.detectors.labels import match_labels, nearest, read_aliases

COCO = dict(enumerate(COCO_NAMES))


def test_every_name_of_voc_is_found_among_cocos_labels():
    found = match_labels(VOC_NAMES, COCO, {})
    said = {name: COCO[ids[0]] for name, ids in found.items()}
    assert {name: label for name, label in said.items() if name != label} == {
        "aeroplane": "airplane",
        "motorbike": "motorcycle",
        "sofa": "couch",
        "tv monitor": "tv",
    }
    assert all(len(ids) == 1 for ids in found.values())


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tvmonitor", "TV monitor"),
        ("car", "car, auto, automobile, machine, motorcar"),
        ("sofa", "sofa, couch, lounge"),
        ("tree", "tree-merged"),
        ("pottedplant", "potted_plant"),
        ("cell phone", "mobile phone"),
    ],
)
def test_spellings_and_synonyms(name, label):
    assert match_labels([name], {7: "wall", 9: label}, {}) == {name: (9,)}


def test_the_very_word_goes_before_a_synonym():
    assert match_labels(["tv"], {1: "television", 2: "tv"}, {}) == {"tv": (2,)}


def test_an_unknown_name_is_told_with_the_nearest_labels():
    with pytest.raises(UsageError, match=r"does not know 'ships wheel' \(nearest labels: .*wheel"):
        match_labels(["dog", "ships wheel"], {0: "dog", 1: "wheel", 2: "cat", 3: "car"}, {})
    assert nearest("traffic sign", ["sofa", "traffic light", "stop sign", "sign"])[0] in (
        "traffic light",
        "stop sign",
        "sign",
    )


def test_no_name_in_common_is_told_with_the_labels():
    with pytest.raises(UsageError, match="knows none of the 2 names; its labels are wall, floor"):
        match_labels(["dog", "cat"], {0: "wall", 1: "floor"}, {})


def test_aliases_say_what_stands_for_a_name(tmp_path):
    file = tmp_path / "aliases.txt"
    file.write_text("# ours\npuppy = dog, wolf\n")
    aliases = read_aliases(file)
    assert match_labels(["puppy"], {3: "wolf", 5: "dog"}, aliases) == {"puppy": (5, 3)}
    with pytest.raises(UsageError, match="no label 'wolf', which is to stand for 'puppy'; nearest: dog"):
        match_labels(["puppy"], {5: "dog"}, aliases)
    file.write_text("puppy dog")
    with pytest.raises(UsageError, match=r"aliases.txt:1: 'puppy dog' is not an alias"):
        read_aliases(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_aliases(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"/dev/zero: it has over"):
        read_aliases("/dev/zero")


class Two:
    """Two dogs of different certainty and a cat."""

    def __init__(self):
        self.labels, self.about = {0: "dog", 1: "cat"}, {"detector": "two"}

    def segment(self, images, wanted):
        mask = lambda x: np.arange(6)[None] == np.full((4, 1), x)
        found = [Instance(0, 0.6, mask(1)), Instance(0, 0.9, mask(2)), Instance(1, 0.3, mask(4))]
        return [[one for one in found if one.label in labels] for labels in wanted]


def columns(detection):
    return [np.flatnonzero(mask.any(0)).tolist() for mask in detection.masks]


def test_all_instances_or_the_first_above_the_score():
    images = np.zeros((1, 4, 6, 3), np.uint8)
    detect = lambda **options: Detector(Two(), ["cat", "dog"], **options).detect(images, [["cat", "dog"]])[0]
    assert columns(detect()) == [[], [1, 2]]
    assert columns(detect(instances="first")) == [[], [2]]
    assert columns(detect(score=0.7)) == [[], [2]]
    assert columns(detect(score=0)) == [[4], [1, 2]]
    assert detect().scores.tolist() == pytest.approx([0, 0.9])


def test_options_outside_their_range():
    with pytest.raises(UsageError, match="least score"):
        Detector(Two(), ["dog"], score=2)
    with pytest.raises(UsageError, match="choose all or first"):
        Detector(Two(), ["dog"], instances="some")


def test_what_decides_a_detection_is_said():
    assert Detector(Two(), ["dog"]).about == {
        "detector": "two", "score": 0.5, "instances": "all", "labels": {"dog": ["dog"]}
    }  # fmt: skip
