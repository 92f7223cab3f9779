"""Masks without training: an object's own text meets the image queries of the UNet's cross-attention.

Marcos-Manchon et al., "Open-Vocabulary Attention Maps" (CVPR 2024): the image queries Q of a cross-attention layer do
not know which words they will meet, so any word can be asked, also one that is not in the prompt. Here an object's
query k_o competes at every head of a layer with the keys of the words that stand before it in the query's template
("a photograph of a"), and with the other objects that are asked:

    p_o = mean over heads of exp(Q k_o / sqrt d) / (sum over template words w of exp(Q k_w / sqrt d)
                                                    + sum over objects j of exp(Q k_j / sqrt d))

averaged over layers. Layers are weighted by measurement, see training/generator/attention.py. The maps are then spread
twice over the image's own affinity (a softmax over cosines of the features of the UNet's last two blocks), as seeds
over a graph of like pixels. A pixel is inside where its share is above half of the object's highest. An object is there
at all only where its share, spread and beside the other objects, is high, and where at its strongest small patch it
outweighs the template's words, since one that is asked alone has no other rival.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.head.folded import fold
from grounded_diffusion.training.head.layers import resize
from grounded_diffusion.training.head.queried import conditional, place_of
from grounded_diffusion.training.head.taps import ModuleOutputs

CAPTURE_TIMESTEP = 121  # of 9 timesteps from 1 to 721 on the shipped model those from 41 to 321 are within two points
SHARPNESS = 4.0  # logit of a pixel with twice the share that is needed
GRID = 32  # cells a side, at most, of the graph over which maps are spread: it has GRID^4 edges
TINY = 1e-12
OUTSIDE = -1e4  # log-odds that no cell has
ABSENT = 1.0  # a share that no pixel has
PATCH = 8  # patches of the graph's cells to a side; the strongest is that of an object of 1/64 of the image


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Which attention is read, and how a map becomes a mask.

    Attributes:
        layers: (cross-attention module, weight) of those that are read; the weights sum to 1.
        features: modules whose outputs tell which pixels are alike.
        temperature: of the softmax over cosines; small spreads less far.
        spreads: how often a map is spread.
        relative: a pixel is inside above this part of the object's highest share,
        floor: but never below this share.
        presence: an object with a highest share below this is not in the image,
        alone: nor one whose strongest patch has less than this, as log-odds against the template alone.
    """

    layers: tuple[tuple[str, float], ...]
    features: tuple[str, ...]
    temperature: float = 0.15
    spreads: int = 2
    relative: float = 0.5
    floor: float = 0.15
    presence: float = 0.25
    alone: float = 0.3
    variant: str = "attention"

    def __post_init__(self):
        if not self.layers:
            raise UsageError("the attention head needs a cross-attention layer to read; this UNet has none")


def affinity_features(unet: nn.Module) -> tuple[str, ...]:
    """The last two up blocks: with its upsampler the one before the last ends at the latents' resolution as well."""
    count = len(unet.up_blocks)
    return tuple(f"up_blocks.{i}" for i in range(max(0, count - 2), count))


class AttentionTaps(ModuleOutputs):
    """Captures image queries, their resolution, and features while it is entered; see Taps."""

    def __init__(self, unet: nn.Module, config: AttentionConfig):
        self.config = config
        layers = [layer for layer, _ in config.layers]
        super().__init__(unet, (*(f"{layer}.to_q" for layer in layers), *map(place_of, layers), *config.features))

    def raw(self) -> Mapping[str, torch.Tensor]:
        """Outputs of the tapped modules by name: [2B,hw,C] of queries, [2B,C,h,w] of features."""
        return dict(self._outputs)

    def features(self) -> Mapping[str, torch.Tensor]:
        """The same in float32."""
        return {name: value.float() for name, value in self._outputs.items()}


class AttentionHead(nn.Module):
    """Image queries and object queries -> mask logits; nothing in it is trained.

    Args:
        config: what is read.
        unet: the model; its key projections are shared, not copied.
        template: [T,D] text states of the words that stand before a name in the query's template, with the begin token.
        latent_size: (h, w) the model was trained at; decides how coarse the affinity graph is.
    """

    def __init__(self, config: AttentionConfig, unet: nn.Module, template: torch.Tensor, latent_size: Sequence[int]):
        super().__init__()
        self.config = config
        attentions = [unet.get_submodule(name) for name, _ in config.layers]
        self.to_k = nn.ModuleList(attention.to_k for attention in attentions)
        self.heads = [attention.heads for attention in attentions]
        self.stride = 2 ** math.ceil(math.log2(max(1, max(latent_size) / GRID)))
        self.latent_multiple = self.stride  # h and w of the latents must be multiples of it
        self.patch = max(1, max(latent_size) // self.stride // PATCH)  # cells to a side
        self.register_buffer("template", template.detach().clone())

    def taps(self, unet: nn.Module) -> AttentionTaps:
        """What captures this head's inputs."""
        return AttentionTaps(unet, self.config)

    def about(self) -> dict[str, Any]:
        """What a bundle's manifest says of the head."""
        return asdict(self.config) | {"layers": dict(self.config.layers), "features": list(self.config.features)}

    def image_queries(self, layer: int, tapped: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The conditional half's image queries [B,hw,C] of a layer."""
        name = self.config.layers[layer][0]
        rows, _, height, width = tapped[place_of(name)].shape
        # Written with the sizes of the place, which the exporter can tell from the batch; those of to_q it cannot.
        sizes = (2, rows // 2, height * width, self.to_k[layer].weight.shape[0])
        return tapped[f"{name}.to_q"].reshape(sizes)[1]

    def shares(
        self, layer: int, image: torch.Tensor, queries: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image queries [B,hw,C] of a layer, object queries [B,O,D] -> what an object has of it, [B,O,hw] each.

        First its share beside the other objects, then its log-odds against the template alone; means over heads.
        """
        batch = queries.shape[0]
        split = lambda x: x.unflatten(-1, (self.heads[layer], -1)).transpose(1, 2)  # [B,heads,n,d]
        words = torch.cat([self.template.expand(batch, -1, -1), queries], 1)  # [B,T+O,D]
        masked = F.pad(~valid, (len(self.template), 0))[:, None, None]  # [B,1,1,T+O]
        q, k = split(image), split(self.to_k[layer](words))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(masked, -3e4)  # [B,heads,hw,T+O]
        before = len(self.template)
        shares = scores.softmax(-1)[..., before:]
        odds = scores[..., before:] - scores[..., :before].logsumexp(-1, keepdim=True)
        return shares.mean(1).transpose(1, 2), odds.mean(1).transpose(1, 2)

    def maps(
        self, tapped: Mapping[str, torch.Tensor], queries: torch.Tensor, valid: torch.Tensor, size: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares and log-odds over all layers, at one size: [B,O,*size] each."""
        beside = odds = torch.zeros(())
        for i, (name, weight) in enumerate(self.config.layers):
            place = tapped[place_of(name)].shape[2:]
            shares = self.shares(i, self.image_queries(i, tapped), queries, valid)
            both = (weight * resize(share.unflatten(2, place), size) for share in shares)
            beside, odds = (total + share for total, share in zip((beside, odds), both, strict=True))
        return beside, odds

    def strongest(self, odds: torch.Tensor) -> torch.Tensor:
        """Log-odds [B,O,h,w] -> [B,O,1], the mean of the strongest patch."""
        half = self.patch // 2  # around the image, so that a smaller one than a patch can be traced; such patches lose
        odds = F.pad(odds, (half,) * 4, value=OUTSIDE)
        return F.avg_pool2d(odds, self.patch, 1).flatten(2).amax(-1, keepdim=True)

    def affinity(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features [B,C,h,w] each -> row-stochastic [B,n,n] over the n cells of the graph."""
        units = []
        for feature in features:
            cells = feature.flatten(2).transpose(1, 2)  # [B,n,C]
            cells = cells - cells.mean(1, keepdim=True)
            # Not F.normalize, in whose graph tools lose the shapes.
            units.append(cells * torch.rsqrt(cells.square().sum(-1, keepdim=True) + TINY))
        # One product over all channels gives the mean of the cosines, over the temperature.
        joined = torch.cat(units, -1) * (len(features) * self.config.temperature) ** -0.5
        return (joined @ joined.transpose(1, 2)).softmax(-1)

    def forward(
        self, tapped: Mapping[str, torch.Tensor], queries: torch.Tensor, query_valid: torch.Tensor
    ) -> torch.Tensor:
        """`tapped` as AttentionTaps gives it, of [unconditional x B; conditional x B]; the rest as GroundingHead's."""
        cfg = self.config
        features = [conditional(tapped[name]) for name in cfg.features]
        if self.stride > 1:
            features = [F.avg_pool2d(feature, self.stride) for feature in features]
        size = features[-1].shape[2:]
        features = [feature if feature.shape[2:] == size else resize(feature, size) for feature in features]
        maps, odds = (total.flatten(2) for total in self.maps(tapped, queries, query_valid, size))  # [B,O,n]
        strongest = self.strongest(odds.unflatten(2, size))
        affinity, spread = self.affinity(features), maps.transpose(1, 2)  # [B,n,n], [B,n,O]: the small one is turned
        for _ in range(cfg.spreads):
            spread = affinity @ spread
        maps = spread.transpose(1, 2)
        peak = maps.amax(-1, keepdim=True)
        there = (peak > cfg.presence) & (strongest > cfg.alone)
        needed = torch.where(there, (cfg.relative * peak).clamp(min=cfg.floor), ABSENT)
        return (SHARPNESS * (maps / needed - 1)).unflatten(2, size)


@fold.register
def _(head: AttentionHead) -> nn.Module:
    return head.eval().requires_grad_(False)
