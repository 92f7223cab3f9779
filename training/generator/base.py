"""A frozen base model as the training of a head reads it: latents in, tapped features out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.checkpoint import RELEASED_TEMPLATE, Checkpoint, load_base
from grounded_diffusion.training.devices import check_device
from grounded_diffusion.training.fingerprint import weights_digest
from grounded_diffusion.training.generator.text import TextTower, template_states
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.taps import Taps


class FrozenBase:
    """A Stable Diffusion model of which nothing is trained.

    Args:
        source: a diffusers-format directory, or a hub name.
        device: where it runs.
        template: text whose sub-tokens at "{}" make an object's query.

    Attributes:
        parts: unet, vae, text_encoder, tokenizer and scheduler.
        digest: of the weights, see `base_digest`.

    Raises:
        CheckpointError: another family, unreadable, or with missing tensors, which are listed.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu", template: str = RELEASED_TEMPLATE):
        check_device(str(device))
        self.source, self.device, self.template = str(source), torch.device(device), template
        self.parts = load_base(source)
        if self.parts.get("text_encoder_2") is not None or self.parts["unet"].config.get("time_cond_proj_dim"):
            title = FAMILIES[self.parts["family"]].title
            raise CheckpointError(f"{source}: heads are trained on Stable Diffusion 1.x and 2.x only, not on {title}")
        self.digest = base_digest(self.parts)
        self.unet, self.vae, self.text_encoder = (
            self.parts[part].to(self.device) for part in ("unet", "vae", "text_encoder")
        )
        self.tokenizer = self.parts["tokenizer"]
        self.vae.to("cpu")  # until it is asked for: training on images that were generated never does
        self._empty = self.contexts([""])  # [1,77,D]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that the model was trained at, in pixels."""
        size, scale = self.unet.config.sample_size, 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (size, size) if isinstance(size, int) else size
        return height * scale, width * scale

    @torch.no_grad()
    def contexts(self, texts: Sequence[str]) -> torch.Tensor:
        """Text embeddings [B,77,D]."""
        options = dict(padding="max_length", truncation=True, return_tensors="pt")
        ids = self.tokenizer(list(texts), max_length=self.tokenizer.model_max_length, **options).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    @torch.no_grad()
    def queries(self, names: Sequence[str]) -> torch.Tensor:
        """Object queries [N,D]: the mean embedding of the name's own sub-tokens in the query template."""
        rows, start = [], self.template.index("{}")
        for name in names:
            text = self.template.format(name)
            spans = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            inside = [i for i, (a, b) in enumerate(spans) if b > a and a < start + len(name) and b > start]
            rows.append(self.contexts([text])[0, inside].mean(0))
        return torch.stack(rows)

    def template_states(self) -> torch.Tensor:
        """States [T,D] of the query template's words before a name, with the begin token."""
        return template_states(TextTower(self.text_encoder), self.tokenizer, self.template)

    @torch.no_grad()
    def features(
        self, latents: torch.Tensor, prompts: Sequence[str], timesteps: torch.Tensor, taps: Taps
    ) -> list[torch.Tensor]:
        """What the head reads: one UNet call on both halves of guidance.

        Args:
            latents: [B,4,h,w] as the UNet takes them, on any device.
            prompts: B texts.
            timesteps: [B], on any device.
            taps: entered on this UNet.
        """
        self.call(latents, prompts, timesteps)
        return taps.features()

    @torch.no_grad()
    def call(self, latents: torch.Tensor, prompts: Sequence[str], timesteps: torch.Tensor) -> torch.Tensor:
        """The UNet's output for [unconditional x B; conditional x B]; the arguments are those of `features`."""
        context = self.contexts(prompts)
        context = torch.cat([self._empty.expand_as(context), context])
        latents, timesteps = latents.to(self.device), timesteps.to(self.device)
        return self.unet(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), context).sample

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B,3,H,W] in [-1,1] -> clean latents [B,4,h,w], scaled as the UNet takes them."""
        self.vae.to(self.device)
        mode = self.vae.encode(images.to(self.device)).latent_dist.mode()
        return (mode - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean latents [B,4,h,w], as the UNet takes them -> images [B,3,H,W] in [-1,1]; the inverse of `encode`."""
        self.vae.to(self.device)
        latents = latents.to(self.device) / self.vae.config.scaling_factor
        return self.vae.decode(latents + (self.vae.config.get("shift_factor") or 0.0)).sample.clamp(-1, 1)

    def with_head(self, head: GroundingHead, **about: Any) -> Checkpoint:
        """The model with a head, as a checkpoint."""
        return Checkpoint(**self.parts, head=head, query_template=self.template, **about)


def base_digest(parts: dict[str, Any]) -> str:
    """What tells this base model from another; a copy in FP16 is the same."""
    known = ("unet", "text_encoder", "text_encoder_2", "vae")
    return weights_digest(*(parts[part] for part in known if parts.get(part) is not None))
