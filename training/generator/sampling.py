"""Reference sampling in torch: guided DDIM, with the latent before the captured call kept."""

from __future__ import annotations

import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.devices import fast_autocast


@torch.no_grad()
def sample_images(
    unet, text_encoder, tokenizer, vae, scheduler, prompts: list[str], generator, steps: int = 25, guidance: float = 5.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B,3,H,W] in [-1,1] and the latents [B,4,h,w] that went into the last UNet call.

    The last call of leading-spaced DDIM is at timestep 1, which is where the grounding head looks.
    """
    if not prompts:
        raise UsageError("sample_images was given no prompts")
    device = unet.device
    options = dict(padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    ids = tokenizer([""] * len(prompts) + prompts, **options).input_ids.to(device)  # [2B,77]
    size = unet.config.sample_size
    latents = torch.randn(len(prompts), unet.config.in_channels, size, size, generator=generator).to(device)
    scheduler.set_timesteps(steps)
    with fast_autocast(device.type):
        context = text_encoder(ids).last_hidden_state  # [2B,77,D]
        for t in scheduler.timesteps:
            captured = latents
            double = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
            uncond, cond = unet(double, t, context, return_dict=False)[0].float().chunk(2)
            latents = scheduler.step(uncond + guidance * (cond - uncond), t, latents).prev_sample
        images = vae.decode(latents / vae.config.scaling_factor).sample.float()
    return images.clamp(-1, 1), captured
