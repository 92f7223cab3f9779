"""A batch to make and a batch made, whether the loop runs on the host or on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grounded_diffusion.bundle import VAE_DECODER
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.denoise import Conditioning, Denoised, check_finite, denoise, not_finite
from grounded_diffusion.engine.sampling.schedule import Schedule
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.kernels import MaskResult, image_epilogue, mask_epilogue

MAX_ROWS = 1024  # of a schedule: 1000 training timesteps, and one call more with PNDM
MASKS, PIXELS = MAX_ROWS, MAX_ROWS + 1  # rows of the flags after those of the steps
FLAG_ROWS = MAX_ROWS + 2


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """B images to make. Arguments of `denoise`, and of the epilogues.

    Attributes:
        schedule: the sampler's table.
        conditioning: what is to be seen.
        noise: standard normal float32 [B,4,h,w].
        size: (H, W) of the images.
        guidance_scale, guidance_interval, capture, step_noise, names: as in `denoise`.
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

    def part(self, start: int, stop: int) -> Request:
        """Images `start` to `stop`, alone."""
        given, at, batch = self.conditioning, slice(start, stop), len(self.noise)
        context = np.concatenate([given.context[:batch][at], given.context[batch:][at]])
        return replace(
            self,
            conditioning=Conditioning(context, given.queries[at], given.query_valid[at]),
            noise=self.noise[at],
            step_noise=self.step_noise and (lambda row: self.step_noise(row)[at]),
            names=self.names and self.names[at],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """Images uint8 [B,H,W,3], their masks, and what they were decoded from."""

    images: np.ndarray
    masks: MaskResult
    denoised: Denoised

    @classmethod
    def join(cls, parts: Sequence[Made]) -> Made:
        """Parts of one batch, in order."""
        if len(parts) == 1:
            return parts[0]
        cat = lambda pick: np.concatenate([pick(part) for part in parts])
        fields = ("labels", "masks", "area", "box", "score")
        return cls(
            cat(lambda p: p.images),
            MaskResult(**{name: cat(lambda p, name=name: getattr(p.masks, name)) for name in fields}),
            Denoised(
                cat(lambda p: p.denoised.latents),
                cat(lambda p: p.denoised.mask_logits),
                parts[0].denoised.capture_timestep,
                None if parts[0].denoised.captured is None else cat(lambda p: p.denoised.captured),
            ),
        )


def make(backend: Backend, request: Request) -> Made:
    """Run the loop, the decoder and the epilogues on the host.

    Raises:
        NumericsError: a value is not finite, naming stage, step and sample.
        BackendError: the backend has failed.
    """
    denoised = denoise(
        backend,
        request.schedule,
        request.conditioning,
        request.noise,
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        capture=request.capture,
        step_noise=request.step_noise,
        names=request.names,
    )
    image = backend.run(VAE_DECODER, {"latents": denoised.latents})["image"]
    check_finite(image, request.sample_names, "pixels")
    valid = request.conditioning.query_valid
    masks = mask_epilogue(denoised.mask_logits, valid, request.size, request.threshold)
    return Made(image_epilogue(image), masks, denoised)


def unpack(request: Request, arrays: Mapping[str, np.ndarray]) -> Made:
    """What a device has left in host memory, without its padding, copied out.

    Args:
        arrays: latents, mask_logits, pixels, labels, bits, area, box and score of a bucket of sizes.
    """
    batch, objects = request.conditioning.query_valid.shape
    width = request.size[1]
    real = {name: array[:batch] for name, array in arrays.items()}
    # The bits of a uint32 word are 32 neighbouring pixels, the lowest first: on a little-endian host its bytes are too.
    packed = np.ascontiguousarray(real["bits"][:, :objects]).view(np.uint8)
    masks = MaskResult(
        labels=real["labels"].copy(),
        masks=np.unpackbits(packed, axis=-1, count=width, bitorder="little").view(np.bool_),
        **{name: real[name][:, :objects].copy() for name in ("area", "box", "score")},
    )
    logits = real["mask_logits"][:, :objects].astype(np.float32)
    timestep = request.schedule.rows[request.capture].timestep
    return Made(real["pixels"].copy(), masks, Denoised(real["latents"].copy(), logits, timestep))


def failure(request: Request, flags: np.ndarray) -> NumericsError | None:
    """The first number that was not finite, as `denoise` would have met it.

    Args:
        flags: uint8 [FLAG_ROWS,B], not 0 where the latents after a step, the mask logits or the pixels are not finite.
    """
    rows, batch = len(request.schedule.rows), len(request.noise)
    flags = flags[:, :batch] != 0
    steps = np.flatnonzero(flags[:rows].any(1))
    first = int(steps[0]) if len(steps) else rows
    if flags[MASKS].any() and request.capture <= first:
        row, stage = MASKS, f"mask logits at step {request.capture + 1} of {rows}"
    elif first < rows:
        row, stage = first, f"latents at step {first + 1} of {rows}"
    elif flags[PIXELS].any():
        row, stage = PIXELS, "pixels"
    else:
        return None
    return not_finite(request.sample_names[int(np.argmax(flags[row]))], stage)
