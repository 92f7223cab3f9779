"""The host loops of kernels/host, as nanobind binds them; grounded_diffusion.kernels checks their arguments."""

from collections.abc import Sequence

import numpy as np

def cfg_step(
    output: np.ndarray,
    latents: np.ndarray,
    history: np.ndarray | None,
    noise: np.ndarray | None,
    out_latents: np.ndarray,
    out_input: np.ndarray,
    guidance: float,
    coefficients: tuple[float, float, float, float, float, float],
    weights: Sequence[float],
    slots: Sequence[int],
    head: int,
) -> None: ...
def image_epilogue_f32(image: np.ndarray, out: np.ndarray) -> None: ...
def image_epilogue_f16(image: np.ndarray, out: np.ndarray) -> None: ...
def mask_epilogue(
    logits: np.ndarray,
    valid: np.ndarray,
    limit: float,
    labels: np.ndarray,
    masks: np.ndarray,
    area: np.ndarray,
    box: np.ndarray,
    score: np.ndarray,
) -> None: ...
