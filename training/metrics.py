"""Intersection over union as the paper reports it: pooled by class, then averaged over the classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class PooledIoU:
    """Sums of intersections and unions by class."""

    def __init__(self):
        self.both: dict[str, int] = {}
        self.either: dict[str, int] = {}

    def add(self, name: str, predicted: torch.Tensor, truth: torch.Tensor) -> None:
        """One mask of a class; both are bool [H,W]."""
        self.both[name] = self.both.get(name, 0) + int((predicted & truth).sum())
        self.either[name] = self.either.get(name, 0) + int((predicted | truth).sum())

    def by_name(self) -> dict[str, float]:
        """IoU of every class that has a pixel."""
        return {name: self.both[name] / either for name, either in self.either.items() if either}

    def mean(self, names: Iterable[str] | None = None) -> float | None:
        """mIoU over these classes (all, where none are given); None where there is none of them."""
        found = self.by_name()
        values = [value for name, value in found.items() if names is None or name in set(names)]
        return sum(values) / len(values) if values else None
