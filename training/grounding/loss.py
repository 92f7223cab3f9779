"""The loss of section 3.3.3, and what is made of masks that are all zero."""

from __future__ import annotations

import torch
from torch.nn import functional as F

ZERO_MASKS = ("skip", "trust")


def term_weights(masks: torch.Tensor, valid: torch.Tensor, zero_masks: str = "skip") -> torch.Tensor:
    """Weight [B,O] of each object's term: 1 or 0.

    Args:
        masks: bool [B,O,H,W].
        valid: bool [B,O]; rows that are False are padding.
        zero_masks: "skip" leaves out what the detector did not find ("training w.o. zero masks"); "trust" takes it for
            the truth ("normal training").
    """
    return (valid & masks.flatten(2).any(2) if zero_masks == "skip" else valid).float()


def object_losses(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of every object [B,O], the mean over its pixels; logits and masks are [B,O,H,W]."""
    return F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none").mean(dim=(2, 3))
