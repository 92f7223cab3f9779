"""DAAM, the paper's baseline: the words' own attention while the image is made.

Tang et al., "What the DAAM" (2022): the softmax probabilities of the cross-attention layers of the down and up blocks,
conditional half, summed over all steps; each layer's and head's map is brought to the latent's size (bicubic), clamped
at 0, and averaged. A word is the mean over its tokens, and over its occurrences in the prompt. Its mask is where the
map, brought to the image's size and stretched to [0, 1], is above tau.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import replace_file
from grounded_diffusion.training.evaluation.images import TestImages
from grounded_diffusion.training.evaluation.methods import Ask, Batch, Rows
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.store import Example

TAU = 0.4  # of DAAM's own program
TAUS = tuple(round(0.05 * k, 2) for k in range(4, 18))  # among which the best is looked for
EPS = 1e-8


class Recorder:
    """An attention processor that keeps what the chosen words are given. It computes what diffusers' own does.

    Attributes:
        words: [B,L,O] weights of the context's tokens in the words, of the conditional half; set before a call.
        sums: [B,heads,O,hw], over the calls so far.
    """

    def __init__(self):
        self.words: torch.Tensor | None = None
        self.sums: torch.Tensor | float = 0.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_: object):
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [2B,heads,n,d]
        q, k, v = split(attn.to_q(hidden_states)), *(split(to(encoder_hidden_states)) for to in (attn.to_k, attn.to_v))
        shares = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)  # [2B,heads,hw,L]
        conditional = shares[len(shares) // 2 :].float()
        self.sums = self.sums + (conditional @ self.words[:, None]).transpose(2, 3)
        return attn.to_out[1](attn.to_out[0]((shares @ v).transpose(1, 2).flatten(2)))


@contextlib.contextmanager
def recording(unet, words: torch.Tensor) -> Iterator[list[Recorder]]:
    """Recorders in the cross-attention layers of the down and up blocks; the UNet is left as it was."""
    before, recorders = dict(unet.attn_processors), []
    chosen = dict(before)
    for name in before:
        if ".attn2." in name and not name.startswith("mid_block"):
            recorders.append(Recorder())
            recorders[-1].words, chosen[name] = words, recorders[-1]
    if not recorders:
        raise UsageError("DAAM reads cross-attention in the down and up blocks, and this UNet has none there")
    try:
        unet.set_attn_processor(chosen)
        yield recorders
    finally:
        unet.set_attn_processor(before)


def word_tokens(tokenizer, prompt: str, names: Sequence[str], length: int) -> torch.Tensor:
    """[L,O]: of each name the mean over its tokens in a prompt, wherever it occurs."""
    spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    weights = torch.zeros(length, len(names))
    for o, name in enumerate(names):
        places = [match.span() for match in re.finditer(rf"\b{re.escape(name)}\b", prompt)]
        for i, (low, high) in enumerate(spans[:length]):
            if high > low and any(low < end and high > start for start, end in places):
                weights[i, o] = 1.0
    return weights / weights.sum(0).clamp(min=1)


@torch.no_grad()
def heat_maps(
    base: FrozenBase, examples: Sequence[Example], keys: Sequence[tuple[int, int]], options: Options
) -> torch.Tensor:
    """Maps [B,O,h,w] of images that are made once more, from the noise of (seed, draw), all of as many names."""
    if options.sampler != "ddim":
        raise UsageError(f"DAAM is measured on images of ddim, not of {options.sampler}")
    unet, shape = base.unet, examples[0].latents.shape
    context = base.contexts([example.prompt for example in examples])
    length = context.shape[1]
    words = torch.stack([word_tokens(base.tokenizer, e.prompt, e.names, length) for e in examples]).to(base.device)
    context = torch.cat([base.contexts([""]).expand_as(context), context])
    scheduler = DDIMScheduler.from_config(base.parts["scheduler"].config)
    scheduler.set_timesteps(options.steps)
    latents = torch.from_numpy(batch_normal(list(keys), shape)).to(base.device)
    with recording(unet, words) as recorders:
        for t in scheduler.timesteps:
            unconditional, conditional = unet(torch.cat([latents, latents]), t, context, return_dict=False)[0].chunk(2)
            guided = unconditional + options.guidance_scale * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents).prev_sample
    maps = [to_size(recorder.sums, shape[1:]) for recorder in recorders]  # [B,heads,O,h,w] each
    return torch.cat(maps, 1).mean(1)


def to_size(sums: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps [B,heads,O,hw] of one layer -> [B,heads,O,h,w] at the latent's size, clamped at 0."""
    cells = sums.shape[-1]
    height = round((cells * size[0] / size[1]) ** 0.5)
    maps = sums.unflatten(-1, (height, cells // height)).flatten(1, 2)
    return F.interpolate(maps, tuple(size), mode="bicubic").clamp(min=0).unflatten(1, sums.shape[1:3])


class Daam:
    """Heat maps of a set of generated images: made once, and kept in a file.

    Args:
        images: of the oracle track.
        options: that they were made with.
        file: where maps are kept.
        batch: images to one call.
        say: takes a line.
    """

    def __init__(self, base: FrozenBase, images: TestImages, options: Options, file: Path, batch: int, say):
        self.file = file
        if file.is_file():
            with np.load(file) as content:
                self.maps = {int(k): content[k] for k in content.files}
            return
        self.maps: dict[int, np.ndarray] = {}
        for part in images.batches(batch):
            places = [place for place, _ in part]
            keys = [images.examples.key(place) for place in places]
            maps = heat_maps(base, [example for _, example in part], keys, options)
            self.maps |= zip(places, maps.cpu().numpy(), strict=True)
            say(f"DAAM: {len(self.maps)} of {len(images.kept)} images")
        stream = io.BytesIO()
        np.savez_compressed(stream, **{str(k): value for k, value in self.maps.items()})
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, stream.getvalue())

    def at(self, tau: float) -> DaamMethod:
        """DAAM's masks at a threshold."""
        return DaamMethod(self, tau)


class DaamMethod:
    """See methods.Method. Only names of the prompt have a map."""

    any_name = False

    def __init__(self, daam: Daam, tau: float):
        self.daam, self.tau = daam, tau

    def look(self, batch: Batch) -> Ask:
        def ask(names: Rows) -> list[torch.Tensor]:
            return [self._masks(place, example) for place, example in batch]

        return ask

    def _masks(self, place: int, example: Example) -> torch.Tensor:
        maps = torch.from_numpy(self.daam.maps[place])[None]
        maps = F.interpolate(maps, example.masks.shape[1:], mode="bicubic")[0]
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps - low) / (high - low + EPS) > self.tau
