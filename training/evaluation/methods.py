"""What draws the masks that are measured: a trained head, the head that needs no training, or a detector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from grounded_diffusion.kernels import mask_epilogue
from grounded_diffusion.training.checkpoint import with_attention
from grounded_diffusion.training.detectors.base import Detector
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import inputs_of
from grounded_diffusion.training.grounding.store import Example
from grounded_diffusion.training.head.attention import AttentionHead
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.presence import Presence
from grounded_diffusion.training.images import to_uint8

Batch = Sequence[tuple[int, Example]]  # with their places in the set
Rows = Sequence[Sequence[str]]
Ask = Callable[[Rows], list[torch.Tensor]]


class Method(Protocol):
    """Something that masks names in images.

    Attributes:
        any_name: whether a name that is not in the prompt can be asked for.
    """

    any_name: bool

    def look(self, batch: Batch) -> Ask:
        """Look at images; what is returned takes the names that are asked of each, and gives bool [O,H,W] each."""
        ...


class Queries:
    """Object queries of names, each encoded once."""

    def __init__(self, base: FrozenBase):
        self.base = base
        self._known: dict[str, torch.Tensor] = {}

    def rows(self, names: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(queries [B,O,D], valid [B,O]), padded to the most names."""
        new = [name for name in dict.fromkeys(n for row in names for n in row) if name not in self._known]
        if new:
            self._known |= zip(new, self.base.queries(new), strict=True)
        most, width = max(map(len, names)), next(iter(self._known.values())).shape[0]
        queries = torch.zeros(len(names), most, width, device=self.base.device)
        valid = torch.zeros(len(names), most, dtype=torch.bool, device=self.base.device)
        for b, row in enumerate(names):
            for o, name in enumerate(row):
                queries[b, o], valid[b, o] = self._known[name], True
        return queries, valid


class HeadMethod:
    """A head at the call that the examples have kept. See Method.

    Args:
        base: the frozen model.
        head: in evaluation mode.
        timestep: None reads the examples as they are. Another one noises their latents up to it, each with its own
            noise: for a head that reads earlier in the denoising than the examples were kept.
        presence: leaves out the masks of what it says is not there; None leaves out none.

    Attributes:
        exclusive: whether a pixel is of one object at most, that of the highest logit, as in the engine's labels.
    """

    any_name = True

    def __init__(
        self, base: FrozenBase, head: GroundingHead | AttentionHead, timestep: int | None = None,
        presence: Presence | None = None,
    ):  # fmt: skip
        self.base, self.head, self.timestep, self.queries = base, head, timestep, Queries(base)
        self.presence, self.exclusive = presence, False

    @torch.no_grad()
    def look(self, batch: Batch) -> Ask:
        examples = [example for _, example in batch]
        size = examples[0].masks.shape[1:]
        latents, timesteps = inputs_of(examples)
        if self.timestep is not None:
            latents, timesteps = noised(latents, self.base.parts["scheduler"], self.timestep)
        with self.head.taps(self.base.unet) as taps, contextlib.ExitStack() as stack:
            more = self.presence and stack.enter_context(self.presence.taps(self.base.unet))
            prompts = [example.prompt for example in examples]
            features = self.base.features(latents, prompts, timesteps, taps)

        @torch.no_grad()
        def ask(names: Rows) -> list[torch.Tensor]:
            queries, valid = self.queries.rows(names)
            there = valid
            if more is None:
                logits = self.head(features, queries, valid)
            else:
                logits, states = self.head.with_states(features, queries, valid)
                there = there & (self.presence(more.raw(), logits, queries, states) > 0)
            found = mask_epilogue(logits.float().cpu().contiguous().numpy(), there.cpu().numpy(), size)
            masks = found.masks
            if self.exclusive:
                masks = found.labels[:, None] == np.arange(1, masks.shape[1] + 1)[:, None, None]
            return [torch.from_numpy(mask[: len(row)]) for mask, row in zip(masks, names, strict=True)]

        return ask


class DetectorMethod:
    """A detector on the image that the latents hold. See Method.

    It has learnt all names, and sees what a head sees: an image whose finest lines the autoencoder has lost. What it
    misses, a head can hardly find.
    """

    any_name = True

    def __init__(self, base: FrozenBase, detector: Detector):
        self.base, self.detector = base, detector

    def look(self, batch: Batch) -> Ask:
        latents, _ = inputs_of([example for _, example in batch])
        images = to_uint8(self.base.decode(latents)).numpy()

        def ask(names: Rows) -> list[torch.Tensor]:
            return [torch.from_numpy(found.masks) for found in self.detector.detect(images, names)]

        return ask


def noised(latents: torch.Tensor, scheduler, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [B,4,h,w] of nearly no noise, noised up to a timestep, and that timestep [B]. Noise hangs on them."""
    noise = torch.stack([torch.randn(one.shape, generator=seeded(one)) for one in latents])
    alpha = scheduler.alphas_cumprod[timestep]
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, torch.full((len(latents),), float(timestep))


def seeded(latents: torch.Tensor) -> torch.Generator:
    """A generator of an image's own, whatever batch it is in."""
    return torch.Generator().manual_seed(int(latents.double().abs().sum().item() * 1e6))


def attention_method(base: FrozenBase, names: Mapping[str, Sequence[str]]) -> HeadMethod:
    """The head that needs no training, at its own timestep. `names` are what the model can draw."""
    known = {key: list(value) for key, value in names.items()}
    checkpoint = with_attention(base.parts, names=known, query_template=base.template)
    return HeadMethod(base, checkpoint.head, checkpoint.capture_timestep)
