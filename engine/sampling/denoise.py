"""The denoising loop: noise becomes latents, and at one step the grounding head says where the objects are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from grounded_diffusion.bundle import UNET, UNET_GROUNDED
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.schedule import Schedule
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.kernels import cfg_step


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a batch of B images is to show.

    Attributes:
        context: text embeddings [2B,L,D], rows [unconditional x B; conditional x B].
        queries: object queries [B,O,D], padded to the largest number of objects.
        query_valid: [B,O] bool, False where padded.
    """

    context: np.ndarray
    queries: np.ndarray
    query_valid: np.ndarray

    def row(self, b: int) -> Conditioning:
        """Image b alone."""
        batch = len(self.queries)
        return Conditioning(self.context[[b, batch + b]], self.queries[b : b + 1], self.query_valid[b : b + 1])


@dataclass(frozen=True, slots=True)
class Denoised:
    """What the loop leaves behind.

    Attributes:
        latents: final latents [B,4,h,w].
        mask_logits: [B,O,h',w'], from the captured step.
        capture_timestep: timestep of the captured step.
        captured: [B,4,h,w], what the network was given at the captured step; None where a device has not kept it.
    """

    latents: np.ndarray
    mask_logits: np.ndarray
    capture_timestep: float
    captured: np.ndarray | None = None


def denoise(
    backend: Backend,
    schedule: Schedule,
    conditioning: Conditioning,
    noise: np.ndarray,
    *,
    guidance_scale: float,
    capture: int,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    step_noise: Callable[[int], np.ndarray] | None = None,
    names: Sequence[str] | None = None,
) -> Denoised:
    """Run a schedule from noise to latents.

    Without guidance (scale 1, or outside the interval) only the conditional half runs, except at the captured step:
    the head reads both.

    Args:
        noise: standard normal [B,4,h,w].
        guidance_scale: weight w of classifier-free guidance, u + w (c - u); 1 turns it off.
        capture: index of the row at which the grounding head runs.
        guidance_interval: the part of the way from noise (0) to image (1) that is guided, see Schedule.progress.
        step_noise: row -> standard normal [B,4,h,w]; needed by stochastic samplers only.
        names: what errors call the samples; None counts them from 0.

    Raises:
        NumericsError: a value is not finite, naming stage, step and sample.
    """
    batch, rows = len(noise), schedule.rows
    names = names or [f"sample {i}" for i in range(batch)]
    scales, both = guided_calls(schedule, guidance_scale, guidance_interval, capture)
    slots = schedule.history
    history = np.empty((slots, *noise.shape), np.float32) if slots else None  # ring buffer of past m
    latents = noise * np.float32(schedule.init_noise_sigma)
    network_input = latents * np.float32(rows[0].input_scale)  # both halves of guidance see it
    mask_logits = captured = None
    for i, row in enumerate(rows):
        inputs = {
            "latents": network_input,
            "timestep": np.full(batch, row.timestep, np.float32),
            "context": conditioning.context if both[i] else conditioning.context[batch:],
        }
        if i == capture:
            inputs |= {"queries": conditioning.queries, "query_valid": conditioning.query_valid}
            outputs = backend.run(UNET_GROUNDED, inputs)
            mask_logits = outputs["mask_logits"].copy()
            captured = network_input.copy()
            check_finite(mask_logits, names, f"mask logits at step {i + 1} of {len(rows)}")
        else:
            outputs = backend.run(UNET, inputs)
        cfg_step(
            outputs["model_output"],
            latents,
            history,
            guidance_scale=scales[i] if both[i] else None,
            cx=row.cx,
            co=row.co,
            a=row.a,
            b=row.b,
            head=i % slots if slots else 0,
            noise=step_noise(i) if row.n else None,
            n=row.n,
            next_scale=rows[i + 1].input_scale if i + 1 < len(rows) else 1.0,
            out_latents=latents,
            out_input=network_input,
        )
        check_finite(latents, names, f"latents at step {i + 1} of {len(rows)}")
    return Denoised(latents, mask_logits, rows[capture].timestep, captured)


def guided_calls(
    schedule: Schedule, guidance_scale: float, interval: tuple[float, float], capture: int
) -> tuple[list[float], list[bool]]:
    """The guidance of every call, and which calls run both halves: one entry more than there are rows."""
    start, end = interval
    scales = [guidance_scale if start <= p <= end else 1.0 for p in schedule.progress]
    both = [scale != 1 or i == capture for i, scale in enumerate(scales)]
    return scales, [*both, both[-1]]  # no call follows the last row


def not_finite(name: str, stage: str) -> NumericsError:
    """The error for a sample that holds a NaN or an infinity."""
    return NumericsError(
        f"{name}: the {stage} are not finite; try a smaller guidance scale or more steps, or export the model in fp32"
    )


def check_finite(values: np.ndarray, names: Sequence[str], stage: str) -> None:
    """Raise NumericsError for the first sample of [B,...] that holds a NaN or an infinity."""
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise not_finite(names[int(np.argmin(finite))], stage)
