"""A family's UNet behind one call: latents, timestep and context, whatever else it wants."""

from __future__ import annotations

import torch
from torch import nn

from grounded_diffusion.engine.sampling.guidance import guidance_row


class Denoiser(nn.Module):
    """latents [N,4,h,w], timestep [N], context as `with_guidance` gives it -> model output [N,4,h,w].

    A UNet of SDXL's kind also wants pooled text, a row of the context after those of its tokens, and six numbers: the
    size of the original image, where it was cropped, and the size to make. They are those of the image that is made,
    uncropped, as in diffusers. One that was told its guidance scale in training (LCM) has that in the last row.

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

        self.told = unet.config.get("time_cond_proj_dim") or 0

    def with_guidance(self, context: torch.Tensor, scale: float) -> torch.Tensor:
        """A context as TextTower gives it, with the row for the guidance scale where the UNet wants one."""
        if not self.told:
            return context
        row = torch.from_numpy(guidance_row(scale, self.told, context.shape[-1])).to(context)
        return torch.cat([context, row.expand(len(context), 1, -1)], 1)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        options = {}
        if self.told:
            options["timestep_cond"] = context[:, -1, : self.told]
            context = context[:, :-1]
        if self.sized:
            options["added_cond_kwargs"] = self._added(latents, context[:, -1, : self.pooled])
            context = context[:, :-1]
        return self.unet(latents, timestep, context, return_dict=False, **options)[0]

    def _added(self, latents: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled text and sizes, by diffusers' names."""
        height, width = (side * self.scale for side in latents.shape[2:])
        ones = torch.ones_like(latents[:, :1, 0, 0])  # [N,1]
        sizes = torch.cat([ones * height, ones * width, ones * 0, ones * 0, ones * height, ones * width], 1)
        return {"text_embeds": pooled, "time_ids": sizes}
