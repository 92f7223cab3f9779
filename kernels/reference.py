"""What the kernels must compute, in float64 NumPy with no thought for speed. Tests and benches compare with it."""

from __future__ import annotations

import numpy as np

from grounded_diffusion.kernels.cfg_step import StepCoefficients


def cfg_step(
    step: StepCoefficients,
    model_output: np.ndarray,
    latents: np.ndarray,
    history: np.ndarray | None,
    noise: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """New latents [B, ...], next input (as many rows as `model_output`) and new history [K, B, ...], all float64."""
    output, x = model_output.astype(np.float64), latents.astype(np.float64)
    kept = None if history is None else history.astype(np.float64)
    if step.guidance_scale is not None:
        uncond, cond = np.split(output, 2)
        output = uncond + step.guidance_scale * (cond - uncond)
    m = step.cx * x + step.co * output
    new = step.a * x + step.b[0] * m
    for k, weight in enumerate(step.b):
        if k and weight and kept is not None:
            new = new + weight * kept[(step.head - k) % len(kept)]
    if step.n and noise is not None:
        new = new + step.n * noise.astype(np.float64)
    if kept is not None:
        kept[step.head] = m
    copies = 1 if step.guidance_scale is None else 2
    return new, np.concatenate([new * step.next_scale] * copies), kept


def upsample(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear [..., h, w] to [..., H, W], align_corners=False, edges repeated, in float64."""
    for axis, out in ((-2, size[0]), (-1, size[1])):
        count = logits.shape[axis]
        source = np.maximum((np.arange(out) + 0.5) * count / out - 0.5, 0.0)
        first = np.minimum(source.astype(np.int64), count - 1)
        second = np.minimum(first + 1, count - 1)
        weight = source - first
        if axis == -2:
            weight = weight[:, None]
        logits = logits.astype(np.float64)
        logits = (1.0 - weight) * logits.take(first, axis) + weight * logits.take(second, axis)
    return logits


def mask_epilogue(
    logits: np.ndarray, valid: np.ndarray, size: tuple[int, int], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """The fields of MaskResult, and `logits` [B, O, H, W] at full size, from which a test sees how near a tie is."""
    full = upsample(logits, size)
    with np.errstate(over="ignore"):
        probability = 1.0 / (1.0 + np.exp(-full))
    masks = (probability > threshold) & valid[:, :, None, None]
    batch, objects = valid.shape
    labels = np.zeros((batch, *size), np.uint8)
    best = np.full((batch, *size), -np.inf)
    area = masks.sum((2, 3), dtype=np.int64)
    box = np.zeros((batch, objects, 4), np.int32)
    score = np.zeros((batch, objects))
    for b, o in np.ndindex(batch, objects):
        wins = masks[b, o] & (full[b, o] > best[b])
        best[b][wins] = full[b, o][wins]
        labels[b][wins] = o + 1
        if area[b, o]:
            rows, columns = np.nonzero(masks[b, o])
            left, top = columns.min(), rows.min()
            box[b, o] = left, top, columns.max() - left + 1, rows.max() - top + 1
            score[b, o] = probability[b, o][masks[b, o]].mean()
    return {"labels": labels, "masks": masks, "area": area, "box": box, "score": score, "logits": full}


def pack_bits(masks: np.ndarray) -> np.ndarray:
    """bool [..., W] to uint32 [..., ceil(W / 32)]; pixel x is bit x % 32 of word x // 32."""
    width = masks.shape[-1]
    padding = [(0, 0)] * (masks.ndim - 1) + [(0, -width % 32)]
    return np.ascontiguousarray(np.packbits(np.pad(masks, padding), axis=-1, bitorder="little")).view("<u4")


def image_epilogue(image: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] of an image [B, 3, H, W] in [-1, 1]; a NaN becomes 0.

    In float32, as diffusers does it: which side of a half a value falls on is part of the definition.
    """
    x = np.nan_to_num(image.astype(np.float32), nan=-1.0, posinf=1.0, neginf=-1.0)
    x = np.clip(x * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return (x * np.float32(255.0)).round().astype(np.uint8).transpose(0, 2, 3, 1)
