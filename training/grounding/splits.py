"""Which names a head is trained on, and which are kept from it: the splits of the paper's Table 4, or a user's own.

COCO's names are spelt as COCO itself spells them ("airplane", where Table 4 has "aeroplane"). "mouse" is in no split,
as in the paper: what is drawn for it is the animal. The second "bench" of Table 4 is its "sofa", COCO's "couch".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from grounded_diffusion.engine.prompts.vocabulary import Vocabulary, built_in
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.labels import meaning

_COCO = (
    "airplane, train, parking meter, cat, bear, suitcase, frisbee, snowboard, fork, sandwich, hot dog, toilet, "
    "toaster, hair drier",
    "laptop, remote, keyboard, cell phone, microwave, oven, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, toothbrush",
    "banana, apple, orange, broccoli, carrot, pizza, donut, cake, chair, couch, potted plant, bed, dining table, tv",
)
_VOC = (
    "tv monitor, car, dog, sofa, train",
    "horse, motorbike, person, potted plant, sheep",
    "bus, cat, chair, cow, dining table",
)
UNSEEN = {  # vocabulary -> the unseen names of each split
    vocabulary: tuple(tuple(names.split(", ")) for names in splits)
    for vocabulary, splits in {"voc": _VOC, "coco": _COCO, "things-64": _VOC}.items()
}
LEFT_OUT = {"coco": ("mouse",)}


@dataclass(frozen=True, slots=True)
class Split:
    """Seen and unseen names, and the pairs that occur together.

    Raises:
        UsageError: at construction, where no name is seen, or a name is both.
    """

    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if not self.seen:
            raise UsageError("no name is left to train on; take names out of the unseen ones")
        if both := sorted(set(self.seen) & set(self.unseen)):
            raise UsageError(f"{', '.join(both)}: both seen and unseen; a name is one or the other")

    @property
    def seen_pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of seen names."""
        return tuple(pair for pair in self.pairs if set(pair) <= set(self.seen))

    def among(self, known: Iterable[str]) -> Split:
        """The part of it that is known, spelt as it is there: who knows a "sofa" knows COCO's "couch".

        Raises:
            UsageError: no seen name is known.
        """
        spelt = {meaning(name): name for name in known}
        seen, unseen, *pairs = (
            tuple(spelt[meaning(name)] for name in names if meaning(name) in spelt)
            for names in (self.seen, self.unseen, *self.pairs)
        )
        return Split(seen, unseen, tuple(pair for pair in pairs if len(pair) == 2))


def built_in_split(vocabulary: str, number: int) -> Split:
    """A split of a vocabulary, counted from 1. Raises UsageError for one that is not there."""
    words = built_in(vocabulary)
    splits = UNSEEN[vocabulary]
    if not 1 <= number <= len(splits):
        raise UsageError(f"{vocabulary} has the splits 1 to {len(splits)}, not {number}")
    return split_of(words, splits[number - 1], LEFT_OUT.get(vocabulary, ()))


def split_of(words: Vocabulary, unseen: tuple[str, ...], left_out: tuple[str, ...] = ()) -> Split:
    """A vocabulary cut in two. Raises UsageError for an unseen name that it does not have."""
    if strange := [name for name in unseen if name not in words.names]:
        raise UsageError(f"the unseen {', '.join(strange)} is not among the {len(words.names)} names")
    names = [name for name in words.names if name not in left_out]
    pairs = tuple(pair for pair in words.pairs if not set(pair) & set(left_out))
    return Split(tuple(name for name in names if name not in unseen), tuple(unseen), pairs)
