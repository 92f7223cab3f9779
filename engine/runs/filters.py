"""Filters: which samples are good enough for the data set. All are off unless asked for.

A rejection has a short, stable reason whose part before " of " is its kind: "no mask of dog", "area of dog",
"score of dog", "presence of dog", "overlap of dog and cat", "duplicate of 000123".
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from grounded_diffusion.engine.sampling.sample import Sample
from grounded_diffusion.errors import UsageError

LUMA = np.array([299, 587, 114], np.uint64)  # ITU-R BT.601, in thousandths


@dataclass(frozen=True, slots=True)
class Filters:
    """What a sample must satisfy; None leaves a condition out. Part of a run's fingerprint.

    Attributes:
        require_masks: every object has a mask that is not empty.
        min_area, max_area: bounds on each mask's share of the image. Empty masks are require_masks' matter.
        min_score: least mean probability inside each mask that is not empty.
        min_presence: least probability that each object is in the image; for models that tell it, see gd-train head.
        max_overlap: largest share of the smaller of two masks that the other may cover.
        min_distance: least number of differing bits, of the 64 of `difference_hash`, to every accepted image of the
            same shard; nearer ones are duplicates. Shards are compared with themselves only, so that the outcome does
            not depend on which worker makes which.

    Raises:
        UsageError: a bound outside its range, or min_area over max_area.
    """

    require_masks: bool = False
    min_area: float | None = None
    max_area: float | None = None
    min_score: float | None = None
    max_overlap: float | None = None
    min_distance: int | None = None
    min_presence: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_area", "max_area", "min_score", "max_overlap", "min_presence"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"{name} must be a share from 0 to 1, not {value:g}", name)
        if self.min_area is not None and self.max_area is not None and self.min_area > self.max_area:
            bounds = f"min_area {self.min_area:g} is over max_area {self.max_area:g}"
            raise UsageError(f"{bounds}; nothing would pass", "min_area", "max_area")
        if self.min_distance is not None and not 1 <= self.min_distance <= 64:
            raise UsageError(f"min_distance must be from 1 to 64 bits, not {self.min_distance}", "min_distance")

    def checker(self) -> Checker:
        """A fresh checker, for one shard."""
        return Checker(self)


class Checker:
    """Checks the samples of one shard, in order. Not for several threads at once."""

    def __init__(self, filters: Filters):
        self.filters = filters
        self.hashes: dict[int, int] = {}  # index of an accepted sample -> its hash

    def check(self, sample: Sample) -> str | None:
        """Why a sample is rejected; None where it is accepted, and remembered for the next ones' duplicates."""
        if reason := self.check_masks(sample) or self.check_overlap(sample):
            return reason
        if self.filters.min_distance is None:
            return None
        own = difference_hash(sample.image)
        for index, other in self.hashes.items():
            if (own ^ other).bit_count() < self.filters.min_distance:
                return f"duplicate of {index:06d}"
        self.hashes[sample.index] = own
        return None

    def remember(self, index: int, hash: int | None) -> None:
        """An accepted sample's hash, where samples are compared."""
        if hash is not None:
            self.hashes[index] = hash

    def check_masks(self, sample: Sample) -> str | None:
        """The conditions on single masks."""
        want = self.filters
        for found in sample.objects:
            if found.presence is not None and found.presence < (want.min_presence or 0):
                return f"presence of {found.name}"
            if not found.area:
                if want.require_masks:
                    return f"no mask of {found.name}"
                continue
            share = found.area / sample.labels.size
            if share < (want.min_area or 0) or share > (1 if want.max_area is None else want.max_area):
                return f"area of {found.name}"
            if found.score < (want.min_score or 0):
                return f"score of {found.name}"
        return None

    def check_overlap(self, sample: Sample) -> str | None:
        """The condition on pairs of masks."""
        if self.filters.max_overlap is None:
            return None
        for a, b in combinations(sample.objects, 2):
            smaller = min(a.area, b.area)
            if smaller and np.count_nonzero(a.mask & b.mask) > self.filters.max_overlap * smaller:
                return f"overlap of {a.name} and {b.name}"
        return None


def difference_hash(image: np.ndarray) -> int:
    """64-bit difference hash of an image: whether each cell of an 8x9 grid is brighter than the one to its left.

    Whole numbers throughout, so that all machines agree. Source: N. Krawetz, "Kind of Like That" (dHash), 2013.

    Args:
        image: uint8 [H,W,3], H >= 8 and W >= 9.
    """
    height, width = image.shape[:2]
    rows, columns = np.arange(9) * height // 8, np.arange(10) * width // 9
    sums = np.add.reduceat(image, rows[:-1], axis=0, dtype=np.uint64)  # [8,W,3]
    sums = np.add.reduceat(sums, columns[:-1], axis=1) @ LUMA  # [8,9]
    pixels = (np.diff(rows)[:, None] * np.diff(columns)).astype(np.uint64)  # [8,9]
    brighter = sums[:, 1:] * pixels[:, :-1] > sums[:, :-1] * pixels[:, 1:]  # of means, without dividing
    return int.from_bytes(np.packbits(brighter).tobytes())
