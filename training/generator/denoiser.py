"""A family's UNet behind one call: latents, timestep and context, whatever else it wants."""

from __future__ import annotations

import torch
from torch import nn


class Denoiser(nn.Module):
    """latents [N,4,h,w], timestep [N], context as TextTower gives it -> model output [N,4,h,w].

    A UNet of SDXL's kind also wants pooled text, which is the context's last row, and six numbers of sizes: that of the
    original image, where it was cropped, and the size to make. They are those of the image that is made, uncropped, as
    in diffusers.

    Args:
        unet: a diffusers UNet2DConditionModel.
        vae_scale_factor: pixels to a latent cell.
    """

    def __init__(self, unet: nn.Module, vae_scale_factor: int = 8):
        super().__init__()
        self.unet, self.scale = unet, vae_scale_factor
        self.sized = unet.config.get("addition_embed_type") == "text_time"
        if self.sized:
            sizes = 6 * unet.config.addition_time_embed_dim
            self.pooled = unet.config.projection_class_embeddings_input_dim - sizes

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if not self.sized:
            return self.unet(latents, timestep, context, return_dict=False)[0]
        height, width = (side * self.scale for side in latents.shape[2:])
        ones = torch.ones_like(latents[:, :1, 0, 0])  # [N,1]
        sizes = torch.cat([ones * height, ones * width, ones * 0, ones * 0, ones * height, ones * width], 1)
        added = {"text_embeds": context[:, -1, : self.pooled], "time_ids": sizes}
        return self.unet(latents, timestep, context[:, :-1], added_cond_kwargs=added, return_dict=False)[0]
