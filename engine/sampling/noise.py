"""Noise that belongs to the sample: Philox keyed by (seed, draw), the same on any machine and at any batch size.

Only the raw bits come from NumPy, whose bit generators are frozen; the normal variates are made here (Box & Muller
1958), because NumPy may change its own from version to version.
"""

from __future__ import annotations

import math

import numpy as np

MAX_SEED = 2**63 - 1


def normal(seed: int, draw: int, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Standard normal float32 noise of one sample.

    Args:
        seed: seed of the data set, or of the prompt; 0 to 2**63 - 1.
        draw: index of the sample under that seed.
        shape: of one sample, such as (4, h, w).
        stream: 0 is the initial latents, i + 1 the noise a stochastic sampler adds after row i.
    """
    count = math.prod(shape)
    pairs = -(-count // 2)
    bits = np.random.Philox(key=[seed, draw], counter=[0, 0, 0, stream]).random_raw(2 * pairs)  # uint64
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # (0, 1], so that the logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape).astype(np.float32)


def batch_normal(keys: list[tuple[int, int]], shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Noise of a batch, float32 [B, *shape], from one (seed, draw) per sample."""
    return np.stack([normal(seed, draw, shape, stream) for seed, draw in keys])
