"""From mask logits at feature size to masks, label map, areas, boxes and scores at image size, in one pass.

Logits are upsampled bilinearly (align_corners=False) row by row; the full-size logits never exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from grounded_diffusion import _kernels
from grounded_diffusion.kernels.checks import check_array

MAX_OBJECTS = 255  # labels are bytes, and 0 is the background
MAX_SIDE = 1 << 14  # the taps are exact in 32-bit integers up to here


@dataclass(frozen=True, slots=True)
class MaskResult:
    """Masks of a batch at image size.

    Attributes:
        labels: uint8 [B, H, W]; 0 background, o + 1 where object o has the highest logit of the objects whose
            mask covers the pixel (equal logits: the lower o).
        masks: bool [B, O, H, W]; each object by itself, so they may overlap.
        area: int64 [B, O], pixels of the mask.
        box: int32 [B, O, 4], x, y, width, height of the mask; zeros when it is empty.
        score: float32 [B, O], mean probability inside the mask; 0 when it is empty.
    """

    labels: np.ndarray
    masks: np.ndarray
    area: np.ndarray
    box: np.ndarray
    score: np.ndarray

    @classmethod
    def empty(cls, batch: int, objects: int, size: tuple[int, int]) -> MaskResult:
        """Buffers for a batch; their contents are undefined until an epilogue has written them."""
        return cls(
            labels=np.empty((batch, *size), np.uint8),
            masks=np.empty((batch, objects, *size), np.bool_),
            area=np.empty((batch, objects), np.int64),
            box=np.empty((batch, objects, 4), np.int32),
            score=np.empty((batch, objects), np.float32),
        )


def logit(threshold: float) -> float:
    """The logit whose sigmoid is `threshold`: comparing logits with it saves the sigmoid of every pixel."""
    if not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must lie between 0 and 1, not {threshold}")
    return math.log(threshold / (1.0 - threshold))


def mask_epilogue(logits: np.ndarray, valid: np.ndarray, size: tuple[int, int], threshold: float = 0.5) -> MaskResult:
    """Masks of every object at image size.

    Args:
        logits: float32 [B, O, h, w], at most 255 objects. A NaN is never inside a mask.
        valid: bool [B, O]; an object that is not valid gets an empty mask.
        size: (H, W) in pixels.
        threshold: a pixel is inside where sigmoid(logit) > threshold.

    Raises:
        TypeError, ValueError: an argument of another type, shape or layout, or a threshold outside (0, 1).
    """
    check_array(logits, "logits", (np.float32,), (None, None, None, None))
    batch, objects, low_h, low_w = logits.shape
    check_array(valid, "valid", (np.bool_,), (batch, objects))
    if not (low_h and low_w):
        raise ValueError(f"logits must have at least one cell, not {list(logits.shape)}")
    if objects > MAX_OBJECTS:
        raise ValueError(f"logits must have at most {MAX_OBJECTS} objects, not {objects}")
    height, width = size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(f"size must lie between 1 and {MAX_SIDE} pixels a side, not {size}")
    result = MaskResult.empty(batch, objects, (height, width))
    _kernels.mask_epilogue(
        logits, valid, logit(threshold), result.labels, result.masks, result.area, result.box, result.score
    )
    return result
