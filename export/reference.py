"""What the engine must reproduce: diffusers' own pipeline, with the plain head beside it, in eager torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.generator.text import object_queries
from grounded_diffusion.training.head.head import upsample_logits


@dataclass(frozen=True, slots=True)
class Reference:
    """images uint8 [B,H,W,3]; masks bool [B,O,H,W], the object's logit above 0."""

    images: torch.Tensor
    masks: torch.Tensor


def reference_pipeline(checkpoint: Checkpoint) -> StableDiffusionPipeline:
    """diffusers' pipeline over the checkpoint's modules, sampling with DDIM."""
    diffusers_logging.set_verbosity_error()
    pipeline = StableDiffusionPipeline(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=DDIMScheduler.from_config(checkpoint.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    checkpoint: Checkpoint,
    prompts: list[str],
    names: list[str],
    noise: torch.Tensor,
    steps: int,
    guidance_scale: float,
    capture_timestep: float,
) -> Reference:
    """Guided images of B prompts from the initial noise [B,4,h,w], and a mask of every name in every one."""
    pipeline, scale = reference_pipeline(checkpoint), checkpoint.vae_scale_factor
    height, width = (side * scale for side in noise.shape[2:])
    captured = []

    with checkpoint.head.taps(checkpoint.unet) as taps:

        def keep(_pipeline, _step, timestep, _tensors):
            if float(timestep) == capture_timestep:
                captured[:] = [taps.features()]
            return {}

        pixels = pipeline(
            prompts,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=noise,
            output_type="np",
            callback_on_step_end=keep,
        ).images
    queries = object_queries(checkpoint.tower, checkpoint.tokenizer, checkpoint.query_template, names)
    queries = queries.expand(len(prompts), -1, -1)
    logits = checkpoint.head(captured[0], queries, torch.ones(queries.shape[:2], dtype=torch.bool))
    return Reference(
        (torch.from_numpy(pixels) * 255).round().to(torch.uint8), upsample_logits(logits, (height, width)) > 0
    )
