"""Counts, areas and scores of a data set's classes, and how its masks overlap."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.reader import FolderDataset

BINS = 10  # of the histograms


@dataclass(slots=True)
class Tally:
    """Numbers between 0 and 1, as they come: how many, their sum, extremes and histogram of BINS equal bins."""

    count: int = 0
    total: float = 0.0
    least: float = 1.0
    most: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.bins[min(int(value * BINS), BINS - 1)] += 1

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.total / self.count if self.count else 0.0


def statistics(data: FolderDataset) -> dict[str, Any]:
    """Counts and areas per class and overlaps per pair of classes, as JSON takes them.

    `classes`: by name, how many images ask for it (`images`), how many of these masks are empty (`empty`), the others'
    smallest, mean and largest share of the image and how many have each tenth (`areas`), their mean score and how many
    have each tenth (`scores`). `overlaps`: by pair, images where both masks share pixels, of how many that ask for
    both, and the mean intersection over union where they do.
    """
    asked: dict[str, int] = dict.fromkeys(data.names, 0)
    shares, scores = ({name: Tally() for name in data.names} for _ in range(2))
    pairs: dict[tuple[str, str], tuple[Tally, Tally]] = {}  # of all images, and of those that overlap
    for record in data:
        for thing in record.objects:
            asked[thing.name] += 1
            if thing.area:
                shares[thing.name].add(thing.area / (record.width * record.height))
                scores[thing.name].add(thing.score)
        masks = {thing.name: thing.mask for thing in record.objects} if len(record.objects) > 1 else {}
        for pair in combinations(sorted(masks), 2):
            shared, either = (
                int(join(masks[pair[0]], masks[pair[1]]).sum()) for join in (np.logical_and, np.logical_or)
            )
            every, overlapping = pairs.setdefault(pair, (Tally(), Tally()))
            every.add(shared / max(either, 1))
            if shared:
                overlapping.add(shared / either)
    return {
        "images": len(data),
        "objects": sum(asked.values()),
        "classes": {name: class_statistics(asked[name], shares[name], scores[name]) for name in data.names},
        "overlaps": [
            {"classes": list(pair), "images": every.count, "overlapping": some.count, "mean_iou": some.mean}
            for pair, (every, some) in sorted(pairs.items())
        ],
    }


def class_statistics(asked: int, shares: Tally, scores: Tally) -> dict[str, Any]:
    """A class's entry."""
    return {
        "images": asked,
        "empty": asked - shares.count,
        "min_area": shares.least if shares.count else 0.0,
        "mean_area": shares.mean,
        "max_area": shares.most,
        "mean_score": scores.mean,
        "areas": shares.bins,
        "scores": scores.bins,
    }
