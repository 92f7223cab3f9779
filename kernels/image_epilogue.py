"""From the decoder's image in [-1, 1] to bytes, rounded as diffusers' VaeImageProcessor rounds."""

from __future__ import annotations

import numpy as np

from grounded_diffusion import _kernels
from grounded_diffusion.kernels.checks import check_apart, check_array, check_output


def image_epilogue(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """round(clip(x / 2 + 1/2, 0, 1) * 255), halves to even, channels last; a NaN becomes 0.

    Args:
        image: float32 or float16 [B, 3, H, W]; the arithmetic is float32 for both.
        out: uint8 [B, H, W, 3] to write, or None for a fresh one.

    Raises:
        TypeError, ValueError: an argument of another type, shape or layout.
    """
    check_array(image, "image", (np.float32, np.float16), (None, 3, None, None))
    batch, _, height, width = image.shape
    out = check_output(out, "out", np.uint8, (batch, height, width, 3))
    check_apart({"out": out}, {"image": image})
    if image.dtype == np.float16:
        _kernels.image_epilogue_f16(image.view(np.uint16), out)
    else:
        _kernels.image_epilogue_f32(image, out)
    return out
