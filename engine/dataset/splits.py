"""Train and val: which samples are kept for validation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from grounded_diffusion.engine.dataset.record import sample_id


class Splitter:
    """Says of one sample after the other whether it belongs to val.

    Of every 1 / `share` samples of a class one is taken, at a place that the ids' hashes choose (systematic sampling
    with a random place in each interval); of several classes, what they are owed in the mean decides. So every class
    has its share to within an image or two, no pattern of the prompts is followed, and what comes later changes
    nothing: a data set that grows keeps its split.

    Args:
        share: of val, between 0 and 1.
    """

    def __init__(self, share: float):
        self.share = share
        self._owed: defaultdict[str, float] = defaultdict(float)  # by class: samples that val should have and has not

    def in_val(self, index: int, names: Sequence[str]) -> bool:
        """Whether sample `index`, with objects of these names, belongs to val. Samples are told in their order."""
        classes = [name.casefold() for name in names] or [""]
        before = sum(self._owed[name] for name in classes) / len(classes)
        now, passed = before + self.share, max(before, 0.0)  # the part of the interval behind us that had no sample
        chosen = now - passed > chance(sample_id(index)) * (1 - passed)
        for name in classes:
            self._owed[name] += self.share - chosen
        return chosen


def chance(id: str) -> float:
    """A number from 0 to 1 that an id has on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") / 2**64
