"""The guidance scale as a number that a network is told, where it was trained to be (Meng et al. 2023; LCM)."""

from __future__ import annotations

import math

import numpy as np

STEPS = 1000.0  # of a timestep embedding for each unit of the scale, as diffusers has it


def guidance_row(scale: float, width: int, context_dim: int) -> np.ndarray:
    """The last row of a context: the sinusoidal embedding, `width` wide, of (scale - 1) * 1000, then zeros.

    Returns:
        float32 [context_dim].
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * (-math.log(10000.0) / (half - 1)))
    phase = (scale - 1) * STEPS * frequencies
    row = np.zeros(context_dim, np.float32)
    row[: 2 * half] = np.concatenate([np.sin(phase), np.cos(phase)])
    return row
