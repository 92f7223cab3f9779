"""What the engine must reproduce: diffusers' own pipeline, with the plain head beside it, in eager torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.head.head import upsample_logits
from grounded_diffusion.training.head.taps import Taps


@dataclass(frozen=True, slots=True)
class Reference:
    """images uint8 [B,H,W,3]; masks bool [B,O,H,W], the object's logit above 0."""

    images: torch.Tensor
    masks: torch.Tensor


def object_queries(checkpoint: Checkpoint, names: list[str]) -> torch.Tensor:
    """[O,D]: the mean last hidden state over the sub-tokens of each name, in the query template."""
    rows, start = [], checkpoint.query_template.index("{}")
    for name in names:
        coded = checkpoint.tokenizer(
            checkpoint.query_template.format(name),
            padding="max_length",
            max_length=checkpoint.tokenizer.model_max_length,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        hidden = checkpoint.text_encoder(coded.input_ids).last_hidden_state[0]  # [77,D]
        low, high = coded.offset_mapping[0].unbind(-1)
        rows.append(hidden[(high > low) & (low < start + len(name)) & (high > start)].mean(0))
    return torch.stack(rows)


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

    with Taps(checkpoint.unet) as taps:

        def keep(_pipeline, _step, timestep, _tensors):
            if float(timestep) == capture_timestep:
                captured[:] = taps.features()
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
    queries = object_queries(checkpoint, names).expand(len(prompts), -1, -1)
    logits = checkpoint.head(captured, queries, torch.ones(queries.shape[:2], dtype=torch.bool))
    return Reference(
        (torch.from_numpy(pixels) * 255).round().to(torch.uint8), upsample_logits(logits, (height, width)) > 0
    )
