"""The denoising loop: noise becomes latents, and at one step the grounding head says where the objects are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grounded_diffusion.bundle import PRESENCE, UNET, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult, Denoised, decoded_at_once, probability
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.kernels import cfg_step, image_epilogue, mask_epilogue


def denoise(backend: Backend, request: BatchRequest) -> Denoised:
    """Run a schedule from noise to latents.

    Raises:
        NumericsError: a value is not finite, naming stage, step and sample.
        BackendError: the backend has failed.
    """
    given, schedule, names = request.conditioning, request.schedule, request.sample_names
    batch, steps = len(request.noise), request.steps()
    latents = request.noise * np.float32(schedule.init_noise_sigma)  # [B,4,h,w]
    network_input = latents * np.float32(schedule.rows[0].input_scale)  # both halves of guidance see it
    history = np.empty((schedule.history, *latents.shape), np.float32) if schedule.history else None
    mask_logits = captured = np.empty(0, np.float32)  # of the captured step, to come
    presence: np.ndarray | None = None  # likewise, where the model tells it
    for i, step in enumerate(steps):
        at = f"at step {i + 1} of {len(steps)}"
        inputs = {
            "latents": network_input,
            "timestep": np.full(batch, step.timestep, np.float32),
            "context": given.context if step.both_halves else given.context[batch:],
        }
        if step.grounded:
            inputs |= {"queries": given.queries, "query_valid": given.query_valid}
            outputs = backend.run(UNET_GROUNDED, inputs)
            mask_logits, captured = outputs["mask_logits"].copy(), network_input.copy()
            check_finite(mask_logits, names, f"mask logits {at}")
            if PRESENCE in outputs:
                check_finite(outputs[PRESENCE], names, f"presence {at}")
                presence = probability(outputs[PRESENCE])
        else:
            outputs = backend.run(UNET, inputs)
        noise = request.noise_after(i) if step.update.n else None
        cfg_step(
            step.update, outputs["model_output"], latents, history,
            noise=noise, out_latents=latents, out_input=network_input,
        )  # fmt: skip
        check_finite(latents, names, f"latents {at}")
    return Denoised(latents, mask_logits, steps[request.capture].timestep, captured, presence)


def make_batch(backend: Backend, request: BatchRequest) -> BatchResult:
    """Run the loop, the decoder and the epilogues on the host. Raises as `denoise` does."""
    denoised = denoise(backend, request)
    batch, _, height, width = denoised.latents.shape
    rows = decoded_at_once(batch, height * width)
    pixels = np.empty((batch, *request.size, 3), np.uint8)
    for start in range(0, batch, rows):
        part = slice(start, min(batch, start + rows))
        image = backend.run(VAE_DECODER, {"latents": denoised.latents[part]})["image"]
        check_finite(image, request.sample_names[part], "pixels")
        image_epilogue(image, pixels[part])
    masks = mask_epilogue(denoised.mask_logits, request.conditioning.query_valid, request.size, request.threshold)
    return BatchResult(pixels, masks, denoised)


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
