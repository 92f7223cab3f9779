"""Intersection over union as the paper reports it, pooled by class and averaged over the classes; and its ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional as F

from grounded_diffusion.training.head.head import upsample_logits


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


def confusion(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Pixels of each class (rows) that were taken for each (columns), int64 [classes,classes], of two class maps."""
    return torch.bincount((truth * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)


def confusion_iou(counts: torch.Tensor) -> torch.Tensor:
    """Intersection over union per class [classes] from a confusion; NaN where a class is absent."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - both)


def grid_ceiling(masks: torch.Tensor, cells: int | Sequence[int], steps: int = 60) -> float:
    """Best mean IoU that bilinear logits on a grid can reach on masks [M,H,W], by fitting them.

    Args:
        cells: of the grid, (h, w) or one number for both.
    """
    if not len(masks):
        return float("nan")
    truth, size = masks.float()[:, None], (cells, cells) if isinstance(cells, int) else tuple(cells)
    logits = (F.interpolate(truth, size, mode="area") * 8 - 4).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(upsample_logits(logits, truth.shape[-2:]), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fitted = upsample_logits(logits.detach(), truth.shape[-2:])[:, 0] > 0
    return ((fitted & masks).sum((1, 2)) / (fitted | masks).sum((1, 2)).clamp(min=1)).mean().item()
