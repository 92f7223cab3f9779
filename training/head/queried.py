"""What an object's query meets in the UNet's own cross-attention, whether or not its word is in the prompt.

Image queries Q do not know which words they will meet (Marcos-Manchon et al., "Open-Vocabulary Attention Maps", 2024),
so an object's query k_o can be asked for against the words that stand before a name in the query's template ("a
photograph of a"), at every cell of the image and every head of a layer:

    odds_o = Q k_o / sqrt d - log sum over template words w of exp(Q k_w / sqrt d).

It says nothing of what the head was trained on, and so holds for names that it never saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.training.head.layers import resize
from grounded_diffusion.training.head.taps import Taps, paired

Layers = tuple[tuple[str, int, int], ...]  # (cross-attention module, heads, channels of its queries) of each
HIDDEN = 24  # maps between the two convolutions of Evidence
TAME = 3.0  # odds are divided by this, so that they are about as large as what a convolution likes


def cross_attentions(unet: nn.Module) -> list[str]:
    """Names of a UNet's cross-attention modules."""
    return [name for name, _ in unet.named_modules() if name.endswith(".attn2")]


def read_layers(layers: Iterable[Sequence]) -> Layers:
    """Layers as a file has them."""
    return tuple((str(name), int(heads), int(channels)) for name, heads, channels in layers)


def layers_of(unet: nn.Module, names: Iterable[str] = ()) -> Layers:
    """These cross-attention modules of a UNet, or all that it has."""
    chosen = [(name, unet.get_submodule(name)) for name in names or cross_attentions(unet)]
    return tuple((name, one.heads, one.to_k.weight.shape[0]) for name, one in chosen)


def conditional(rows: torch.Tensor) -> torch.Tensor:
    """The conditional half of [unconditional x B; conditional x B]."""
    return rows[rows.shape[0] // 2 :]  # not len(), which the exporter takes for a constant


def place_of(layer: str) -> str:
    """The module around a cross-attention whose output [2B,C,h,w] tells its resolution."""
    return layer.split(".transformer_blocks.")[0]


def tapped_modules(layers: Layers) -> tuple[str, ...]:
    """What has to be captured: the image queries of each layer, and what tells their resolution."""
    names = [name for name, _, _ in layers]
    return (*(f"{name}.to_q" for name in names), *map(place_of, names))


class QueriedTaps(Taps):
    """Captures the features, and last a mapping by name of what cross-attention gives; see Taps."""

    def __init__(self, unet: nn.Module, layers: Layers):
        self._attention = tapped_modules(layers)
        super().__init__(unet, self._attention)

    def _asked(self) -> dict[str, torch.Tensor]:
        return {name: self._outputs[name] for name in self._attention}

    def raw(self) -> list:
        return [*super().raw(), self._asked()]

    def features(self) -> list:
        return [*paired(super().raw()), self._asked()]


class Queried(nn.Module):
    """Keys of a UNet's cross-attention, for queries of objects.

    Args:
        layers: which are read.
        words: number T of the template's words before a name, with the begin token.
        text_dim: width D of a query.

    The keys are the UNet's own, of which it keeps a copy, so that a head's file has all that belongs to it.
    """

    def __init__(self, layers: Layers, words: int, text_dim: int):
        super().__init__()
        self.layers = layers
        self.to_k = nn.ModuleList(nn.Linear(text_dim, size, bias=False) for _, _, size in layers)
        self.to_k.requires_grad_(False)
        self.register_buffer("template", torch.zeros(words, text_dim))

    def read(self, unet: nn.Module, template: torch.Tensor) -> None:
        """Copy the keys of a UNet. `template` are the states [T,D] of the template's words."""
        self.template.copy_(template)
        for to_k, (name, _, _) in zip(self.to_k, self.layers, strict=True):
            to_k.weight.data.copy_(unet.get_submodule(name).to_k.weight)

    def place(self, layer: int, tapped: Mapping[str, torch.Tensor]) -> torch.Size:
        """(h, w) of a layer's cells."""
        return tapped[place_of(self.layers[layer][0])].shape[2:]

    def image_queries(self, layer: int, tapped: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The conditional half's image queries [B,hw,C] of a layer."""
        name, _, channels = self.layers[layer]
        rows, _, height, width = tapped[place_of(name)].shape
        # Written with the sizes of the place, which the exporter can tell from the batch; those of to_q it cannot.
        return conditional(tapped[f"{name}.to_q"].reshape(rows, height * width, channels)).float()

    def odds(self, layer: int, queries: torch.Tensor, *cells: torch.Tensor) -> list[torch.Tensor]:
        """Log-odds of each object alone against the template's words, at cells [B or 1,n,C] of a layer, head by head:
        [B,heads,n,O] each."""
        _, heads, channels = self.layers[layer]
        split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [...,heads,n,d]
        words = split(self.to_k[layer](self.template)).transpose(-1, -2)  # [heads,d,T]
        asked = split(self.to_k[layer](queries)).transpose(-1, -2)  # [B,heads,d,O]
        asking = (split(some) * (channels // heads) ** -0.5 for some in cells)
        return [q @ asked - (q @ words).logsumexp(-1, keepdim=True) for q in asking]


class Evidence(Queried):
    """Where an object's query gets attention -> mask logits of its own, and what the image looks like there.

    Args:
        layers, words, text_dim: see Queried.
        dim: width E of the objects.
        fused: channels D of the fused map.
    """

    def __init__(self, layers: Layers, words: int, text_dim: int, dim: int, fused: int):
        super().__init__(layers, words, text_dim)
        self.maps = nn.Conv2d(2 * len(layers), HIDDEN, 3, padding=1)
        self.pair = nn.Conv2d(HIDDEN, 2, 3, padding=1)
        self.looks = nn.Linear(fused, dim)
        for weight in (self.looks.weight, self.looks.bias):
            nn.init.zeros_(weight)

    def forward(
        self, tapped: Mapping[str, torch.Tensor], queries: torch.Tensor, fused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits [B,O,h',w'] and what is added to the objects [B,O,E].

        Args:
            tapped: as QueriedTaps gives it, of [unconditional x B; conditional x B].
            queries: [B,O,text_dim].
            fused: fused map [B,D,h',w'].
        """
        size, maps = fused.shape[2:], []
        for layer in range(len(self.layers)):
            (odds,) = self.odds(layer, queries, self.image_queries(layer, tapped))
            odds = odds.mean(1).transpose(1, 2).unflatten(2, self.place(layer, tapped)) / TAME  # [B,O,h,w]
            maps.append(resize(odds, size))
        stacked = torch.stack(maps, 2)  # [B,O,layers,h',w']
        stacked = torch.cat([stacked, stacked - stacked.mean((3, 4), keepdim=True)], 2)
        pair = self.pair(F.relu(self.maps(stacked.flatten(0, 1)))).unflatten(0, queries.shape[:2])
        logits, weight = pair.unbind(2)
        seen = weight.flatten(2).softmax(-1) @ fused.flatten(2).transpose(1, 2)  # [B,O,D]
        return logits, self.looks(seen)
