"""Intersection over union, pooled; and what a grid can reach at best."""

import pytest
import torch

from grounded_diffusion.training.metrics import PooledIoU, confusion, confusion_iou, grid_ceiling


def test_iou_of_class_maps():
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    assert confusion_iou(confusion(predicted, truth, 2)).tolist() == pytest.approx([1 / 2, 2 / 3])
    assert confusion_iou(confusion(truth, truth, 3))[:2].eq(1).all()
    assert confusion_iou(confusion(truth, truth, 3))[2].isnan()


def test_iou_pools_counts_by_name():
    pooled, truth = PooledIoU(), torch.ones(4, 4, dtype=torch.bool)
    pooled.add("dog", truth & (torch.arange(4) < 2), truth)
    pooled.add("dog", truth, truth)
    pooled.add("cat", ~truth, truth)
    assert pooled.by_name() == {"dog": 24 / 32, "cat": 0}
    assert pooled.mean() == pytest.approx(24 / 64)
    assert pooled.mean(["dog"]) == 24 / 32
    assert pooled.mean(["bus"]) is None


def test_the_ceiling_rises_with_the_grid():
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[:, 3:21, 5:9] = True
    assert grid_ceiling(truth, 4) < grid_ceiling(truth, 8) < grid_ceiling(truth, 32) <= 1
