"""A batch to make, the steps that make it, and what comes of it, on the host as on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from grounded_diffusion.engine.sampling.schedule import Schedule
from grounded_diffusion.kernels import MaskResult, StepCoefficients

DECODE_CELLS = 4 * 64 * 64  # latent cells that are decoded at once: 4 images of Stable Diffusion's 512x512


def decoded_at_once(batch: int, latent_cells: int) -> int:
    """Images of h * w latent cells that the decoder takes at once. Its arrays are at image size: of a whole batch they
    would be the largest of all, and from 32 images on too large for some operators' 32-bit indices.
    """
    return max(1, min(batch, DECODE_CELLS // latent_cells))


def decode_starts(batch: int, at_once: int) -> list[int]:
    """First images of parts of equal size that cover a batch; the last one may repeat images of the part before."""
    return [*range(0, batch - at_once, at_once), batch - at_once]


@dataclass(frozen=True, slots=True, eq=False)
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

    def part(self, start: int, stop: int) -> Conditioning:
        """Images `start` to `stop`, alone."""
        at, batch = slice(start, stop), len(self.queries)
        context = np.concatenate([self.context[:batch][at], self.context[batch:][at]])
        return Conditioning(context, self.queries[at], self.query_valid[at])


@dataclass(frozen=True, slots=True)
class Step:
    """One call of the network, and the update after it.

    Attributes:
        timestep: what the network is told.
        grounded: the grounding head runs too, and gives the masks.
        both_halves: the network runs both halves of guidance, 2B rows; else the conditional half alone.
        update: coefficients of the update.
    """

    timestep: float
    grounded: bool
    both_halves: bool
    update: StepCoefficients


@dataclass(frozen=True, slots=True, eq=False)
class BatchRequest:
    """B images to make.

    Attributes:
        schedule: the sampler's table.
        conditioning: what is to be seen.
        noise: standard normal float32 [B,4,h,w] to start from.
        size: (H, W) of the images.
        guidance_scale: weight w of classifier-free guidance, u + w (c - u); 1 turns it off.
        capture: index of the row at which the grounding head runs.
        guidance_interval: the part of the way from noise (0) to image (1) that is guided, see Schedule.progress.
        step_noise: row -> standard normal [B,4,h,w]; needed by stochastic samplers only.
        names: what errors call the samples; None counts them from 0.
        threshold: a pixel is inside a mask where its probability is above this.
    """

    schedule: Schedule
    conditioning: Conditioning
    noise: np.ndarray
    size: tuple[int, int]
    guidance_scale: float
    capture: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    step_noise: Callable[[int], np.ndarray] | None = None
    names: Sequence[str] | None = None
    threshold: float = 0.5

    @property
    def sample_names(self) -> Sequence[str]:
        """What errors call the samples."""
        return self.names or [f"sample {i}" for i in range(len(self.noise))]

    def noise_after(self, row: int) -> np.ndarray:
        """What a stochastic sampler adds after a row, standard normal [B,4,h,w]. Raises ValueError for want of it."""
        if self.step_noise is None:
            raise ValueError(f"sampler {self.schedule.sampler} adds noise after row {row}, the request has none")
        return self.step_noise(row)

    def steps(self) -> list[Step]:
        """The steps of the schedule, in order.

        Without guidance (scale 1, or outside the interval) only the conditional half runs, except at the captured
        step: the head reads both.
        """
        rows, slots = self.schedule.rows, self.schedule.history
        start, end = self.guidance_interval
        steps = []
        for i, (row, progress) in enumerate(zip(rows, self.schedule.progress, strict=True)):
            scale = self.guidance_scale if start <= progress <= end else 1.0
            grounded = i == self.capture
            both_halves = scale != 1 or grounded
            update = StepCoefficients(
                guidance_scale=scale if both_halves else None,
                cx=row.cx,
                co=row.co,
                a=row.a,
                b=row.b,
                head=i % slots if slots else 0,
                n=row.n,
                next_scale=rows[i + 1].input_scale if i + 1 < len(rows) else 1.0,
            )
            steps.append(Step(row.timestep, grounded, both_halves, update))
        return steps

    def part(self, start: int, stop: int) -> BatchRequest:
        """Images `start` to `stop`, alone."""
        drawn = self.step_noise
        return replace(
            self,
            conditioning=self.conditioning.part(start, stop),
            noise=self.noise[start:stop],
            step_noise=drawn and (lambda row: drawn(row)[start:stop]),
            names=self.names and self.names[start:stop],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Denoised:
    """What the loop leaves behind.

    Attributes:
        latents: final latents [B,4,h,w].
        mask_logits: [B,O,h',w'], from the captured step.
        capture_timestep: timestep of the captured step.
        captured: [B,4,h,w], what the network was given at the captured step.
        presence: [B,O], probability that each object is there at all; None where the model does not tell.
    """

    latents: np.ndarray
    mask_logits: np.ndarray
    capture_timestep: float
    captured: np.ndarray
    presence: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """Images uint8 [B,H,W,3], their masks, and what they were decoded from."""

    images: np.ndarray
    masks: MaskResult
    denoised: Denoised

    @classmethod
    def join(cls, parts: Sequence[BatchResult]) -> BatchResult:
        """Parts of one batch, in order."""
        if len(parts) == 1:
            return parts[0]
        masks = {f.name: np.concatenate([getattr(part.masks, f.name) for part in parts]) for f in fields(MaskResult)}
        return cls(
            np.concatenate([part.images for part in parts]),
            MaskResult(**masks),
            Denoised(
                np.concatenate([part.denoised.latents for part in parts]),
                np.concatenate([part.denoised.mask_logits for part in parts]),
                parts[0].denoised.capture_timestep,
                np.concatenate([part.denoised.captured for part in parts]),
                joined([part.denoised.presence for part in parts]),
            ),
        )


def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Parts of what a model may not tell, in order."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known else None


def probability(logits: np.ndarray) -> np.ndarray:
    """Logits as probabilities, float32."""
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
