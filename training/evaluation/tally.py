"""What has been measured of one method on one set of images, as the paper groups and averages it.

mIoU is pooled: a name's intersections over its unions in a group, then the mean over the names; the mean over masks
stands beside it. Figures are per cent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch

from grounded_diffusion.training.metrics import PooledIoU

GROUPS = ("one_seen", "one_unseen", "two_seen", "two_mixed", "two_unseen")  # the columns of Table 1


def group_of(names: Sequence[str], seen: Collection[str]) -> str | None:
    """The group of an image with these names; None for more than two, which the paper does not have."""
    known = sum(name in seen for name in names)
    if len(names) == 1:
        return GROUPS[1 - known]
    return GROUPS[4 - known] if len(names) == 2 else None


def iou(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union of two masks, bool [H,W]; 1 where both are empty."""
    either = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / either if either else 1.0


def percent(value: float) -> float:
    return round(100 * value, 2)


@dataclass(slots=True)
class Tally:
    """Measurements of one method, image by image.

    Attributes:
        seen: names that the method was trained on.
        scores: (place in the set, group, mean IoU) of every image that counts.
    """

    seen: frozenset[str]
    scores: list[tuple[int, str, float]] = field(default_factory=list)
    _pooled: dict[str, PooledIoU] = field(default_factory=dict)
    _each: dict[str, list[float]] = field(default_factory=dict)
    _swapped: list[bool] = field(default_factory=list)
    _absent: list[float] = field(default_factory=list)

    def add(self, place: int, names: Sequence[str], predicted: torch.Tensor, truth: torch.Tensor) -> None:
        """One image: masks bool [O,H,W] of its names, what the method says and what is true."""
        group = group_of(names, self.seen)
        if group is None:
            return
        values = [iou(p, t) for p, t in zip(predicted, truth, strict=True)]
        for name, p, t in zip(names, predicted, truth, strict=True):
            self._pooled.setdefault(group, PooledIoU()).add(name, p, t)
        self._each.setdefault(group, []).extend(values)
        self.scores.append((place, group, mean(values)))
        if len(names) == 2:
            crossed = [iou(p, t) for p, t in zip(predicted, truth.flip(0), strict=True)]
            self._swapped.append(sum(crossed) > sum(values))

    def add_absent(self, mask: torch.Tensor) -> None:
        """The mask, bool [H,W], of a name that is not in an image."""
        self._absent.append(mask.float().mean().item())

    def figures(self) -> dict[str, float]:
        """Everything by name, see GROUPS; what there is no image of is left out."""
        found: dict[str, float] = {}
        for group in GROUPS:
            if group in self._each and (value := self._pooled[group].mean()) is not None:
                found[group] = percent(value)
                found[f"{group}.per_mask"] = percent(mean(self._each[group]))
                found[f"{group}.images"] = sum(one == group for _, one, _ in self.scores)
        if self._swapped:
            found["swap_rate"] = percent(mean(self._swapped))
        if self._absent:
            found["absent_area"] = percent(mean(self._absent))
        return found

    def by_name(self) -> dict[str, float]:
        """IoU of every name in images of one object, per cent."""
        one = [self._pooled[group].by_name() for group in GROUPS[:2] if group in self._pooled]
        return {name: percent(value) for values in one for name, value in values.items()}
