"""What the engine must reproduce: diffusers' own pipeline, with the plain head beside it, in eager torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging

from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.generator.text import object_queries, tokenize
from grounded_diffusion.training.head.head import upsample_logits

SECOND_PAD = 0  # id of the token with which SDXL's second text encoder is padded, its first with the end token


@dataclass(frozen=True, slots=True)
class Reference:
    """images uint8 [B,H,W,3]; masks bool [B,O,H,W], the object's logit above 0."""

    images: torch.Tensor
    masks: torch.Tensor


def reference_pipeline(checkpoint: Checkpoint) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' pipeline over the checkpoint's modules, sampling with DDIM."""
    diffusers_logging.set_verbosity_error()
    parts = dict(
        vae=checkpoint.vae,
        text_encoder=checkpoint.text_encoder,
        tokenizer=checkpoint.tokenizer,
        unet=checkpoint.unet,
        scheduler=DDIMScheduler.from_config({"clip_sample": False, **checkpoint.scheduler.config}),  # unless it says so
        feature_extractor=None,
    )
    if checkpoint.text_encoder_2 is not None:
        second = copy.deepcopy(checkpoint.tokenizer)
        second.pad_token = second.convert_ids_to_tokens(SECOND_PAD)
        pipeline = StableDiffusionXLPipeline(
            **parts, text_encoder_2=checkpoint.text_encoder_2, tokenizer_2=second, add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
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
    """Guided images of B prompts from the initial noise [B,4,h,w], and a mask of every name in every one.

    A model that is told its guidance scale (LCM) runs one half in diffusers; the head is then given both, as the engine
    gives them.
    """
    pipeline, scale = reference_pipeline(checkpoint), checkpoint.vae_scale_factor
    height, width = (side * scale for side in noise.shape[2:])
    captured, told = [], checkpoint.denoiser.told

    def both_halves(timestep, latents):
        empty = checkpoint.tower(tokenize(checkpoint.tokenizer, [""] * len(prompts)))
        context = torch.cat([empty, checkpoint.tower(tokenize(checkpoint.tokenizer, prompts))])
        context = checkpoint.denoiser.with_guidance(context, guidance_scale)
        checkpoint.denoiser(torch.cat([latents, latents]), timestep.float().expand(len(context)), context)

    with checkpoint.head.taps(checkpoint.unet) as taps:

        def keep(_pipeline, _step, timestep, tensors):
            if float(timestep) == capture_timestep:
                if told:
                    both_halves(timestep, before[0])
                captured[:] = [taps.features()]
            before[:] = [tensors["latents"]]
            return {}

        before = [noise]

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
