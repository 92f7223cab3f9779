"""Which cross-attention layers tell objects apart, measured on the model itself, and the attention head made of them.

Labels are not needed. The model draws a few nouns; at a layer that grounds, the places that answer most to the noun
that was drawn answer less to the other nouns. The gap is the layer's margin: on the shipped model, over 168 images, it
is 0.34 and 0.23 at the two layers whose masks agree with an independent segmenter, and at most 0.03 at the other five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers import DDIMScheduler

from grounded_diffusion.training.generator.denoiser import Denoiser
from grounded_diffusion.training.generator.text import TextTower, object_queries, template_states, tokenize
from grounded_diffusion.training.head.attention import (
    CAPTURE_TIMESTEP,
    AttentionConfig,
    AttentionHead,
    AttentionTaps,
    affinity_features,
)
from grounded_diffusion.training.head.queried import cross_attentions

NOUNS = ("dog", "car", "chair", "bird", "boat", "cat", "bottle", "tree")  # drawn where the model names no objects
STEPS = 8  # of DDIM; the step before the last is near CAPTURE_TIMESTEP
GUIDANCE = 5.0
LARGE = 1024  # latent cells; above, half as many nouns are drawn, at half the side
STRONGEST = 8  # the strongest 1/8 of the cells answer for a noun
WEAK = 0.5  # log-odds below what drawn nouns reach, where that is less than the usual threshold, are enough
LEAST = 0.4  # of the best layer's margin; weaker layers are left out


@torch.no_grad()
def draw(
    denoiser: Denoiser, scheduler, context: torch.Tensor, latents: torch.Tensor, taps: AttentionTaps, guidance: float
) -> None:
    """Denoise latents [B,4,h,w] with context [2B,L,D] down to the capture timestep; `taps` hold that call."""
    context = denoiser.with_guidance(context, guidance)
    guidance = 1.0 if denoiser.told else guidance
    scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps[:-1]:
        double = torch.cat([latents, latents])
        output = denoiser(double, timestep.float().expand(len(double)), context)
        unconditional, conditional = output.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    with taps:
        denoiser(torch.cat([latents, latents]), torch.full((2 * len(latents),), float(CAPTURE_TIMESTEP)), context)


@torch.no_grad()
def margins(head: AttentionHead, taps: AttentionTaps, queries: torch.Tensor) -> torch.Tensor:
    """By how much each layer's strongest cells prefer the noun that was drawn: one for every layer.

    Args:
        head, taps: of all layers, taps holding a call for images of nouns 0, 1, ...
        queries: [N,D] of all nouns, N at least as many as images.
    """
    tapped, result = taps.features(), []
    for i in range(len(head.config.layers)):
        image = head.image_queries(i, tapped)
        batch = len(image)
        ask = lambda q: head.shares(i, image, q.expand(batch, 1, -1), torch.ones(batch, 1, dtype=torch.bool))[0]  # noqa: B023
        shares = torch.cat([ask(query) for query in queries], 1)  # [B,N,hw]
        answers = shares.topk(max(1, shares.shape[2] // STRONGEST)).values.mean(2)  # [B,N]
        own = answers.diagonal()
        others = (answers.sum(1) - own) / (len(queries) - 1)
        result.append((own - others).mean())
    return torch.stack(result)


@torch.no_grad()
def attention_head(
    unet,
    tower: TextTower,
    tokenizer,
    scheduler,
    template: str,
    *,
    latent_size: tuple[int, int],
    vae_scale_factor: int = 8,
    nouns: Sequence[str] = NOUNS,
    guidance: float = GUIDANCE,
    report: Callable[[str], None] = lambda line: None,
) -> AttentionHead:
    """An attention head whose layers are chosen and weighted by their margins.

    Args:
        template: of queries, with "{}" for the object's name.
        latent_size: (h, w) the model was trained at.
        nouns: what the model can draw, at least two.
        guidance: with which it draws; 1 for a model that wants none.
    """
    large = latent_size[0] * latent_size[1] > LARGE
    names = list(dict.fromkeys(nouns))[: 4 if large else 8]
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    height, width = (max(multiple, side // 2 // multiple * multiple) if large else side for side in latent_size)
    words = template_states(tower, tokenizer, template)
    equal = tuple((name, 1.0) for name in cross_attentions(unet))
    features = affinity_features(unet)
    head = AttentionHead(AttentionConfig(equal, features), unet, words, latent_size)
    taps = head.taps(unet)
    noise = torch.randn(len(names), unet.config.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    report(f"drawing {', '.join(names)} to find the layers that tell them apart")
    denoiser = Denoiser(unet, vae_scale_factor)
    context = tower(tokenize(tokenizer, [""] * len(names) + [template.format(name) for name in names]))
    draw(denoiser, scheduler, context, noise, taps, guidance)
    gaps = margins(head, taps, object_queries(tower, tokenizer, template, names)).clamp(min=1e-6)
    kept = [i for i, gap in enumerate(gaps.tolist()) if gap >= LEAST * gaps.max()]
    weights = gaps[kept] / gaps[kept].sum()
    layers = tuple((equal[i][0], round(float(w), 4)) for i, w in zip(kept, weights, strict=True))
    report(
        "masks are read at " + ", ".join(f"{name} ({gaps[i]:.2f})" for i, (name, _) in zip(kept, layers, strict=True))
    )
    chosen = AttentionHead(AttentionConfig(layers, features), unet, words, latent_size)
    queries = object_queries(tower, tokenizer, template, names)[:, None]  # [B,1,D], image b has noun b
    return AttentionHead(calibrated(chosen, taps, queries), unet, words, latent_size)


@torch.no_grad()
def calibrated(head: AttentionHead, taps: AttentionTaps, queries: torch.Tensor) -> AttentionConfig:
    """The head's configuration, with lower thresholds where what the model draws does not reach them.

    Args:
        taps: holding a call for images of nouns, whose queries are [B,1,D].
    """
    tapped, config = taps.features(), head.config
    size = tapped[config.features[-1]].shape[2:]
    _, odds = head.maps(tapped, queries, torch.ones(queries.shape[:2], dtype=torch.bool), size)
    usual = head.strongest(odds).median()
    if usual >= config.alone:
        return config
    alone = usual.item() - WEAK
    less = (torch.tensor([alone, config.alone]).sigmoid()).tolist()  # the same as shares
    scaled = {name: getattr(config, name) * less[0] / less[1] for name in ("floor", "presence")}
    return replace(config, **{name: round(value, 4) for name, value in (scaled | {"alone": alone}).items()})
