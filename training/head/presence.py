"""Whether an object is in an image at all: what the UNet's own cross-attention says of it, inside its mask.

The head draws a mask for every query, also for an object that is not there, and draws it with confidence. What gives
such a mask away is the attention that its query gets: an object's query k_o against the words that stand before a name
in the query's template ("a photograph of a"), at every cell of the image, averaged over a layer's heads,

    s_o = exp(Q k_o / sqrt d) / (sum over template words w of exp(Q k_w / sqrt d) + exp(Q k_o / sqrt d)).

A layer gives two numbers: the mean of s_o weighted by the mask's probability, and weighted by the rest. Their log-odds
go through a logistic regression, calibrated on queries of names that are in an image and of others that are not. No
name has a weight of its own in it, so it holds for names that it was not calibrated on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.head.attention import conditional, cross_attentions, place_of
from grounded_diffusion.training.head.head import resize
from grounded_diffusion.training.head.taps import ModuleOutputs

EPS = 1e-4  # of shares, before their log-odds


@dataclass(frozen=True, slots=True)
class PresenceConfig:
    """Which attention is read.

    Attributes:
        layers: (cross-attention module, heads, channels of its queries) of each layer.
        words: of the template, with the begin token.
        text_dim: width of a query.
    """

    layers: tuple[tuple[str, int, int], ...]
    words: int
    text_dim: int

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple((str(name), int(h), int(c)) for name, h, c in self.layers))
        if not self.layers:
            raise UsageError("presence needs a cross-attention layer to read; this UNet has none")

    @classmethod
    def for_unet(cls, unet: nn.Module, words: int, layers: Iterable[str] = ()) -> PresenceConfig:
        """Of these cross-attention modules of a UNet, or of all that it has."""
        chosen = [(name, unet.get_submodule(name)) for name in layers or cross_attentions(unet)]
        sizes = tuple((name, one.heads, one.to_k.weight.shape[0]) for name, one in chosen)
        return cls(sizes, words, unet.config.cross_attention_dim)


class PresenceTaps(ModuleOutputs):
    """Captures image queries and their layers' resolution while it is entered; see Taps."""

    def __init__(self, unet: nn.Module, config: PresenceConfig):
        layers = [name for name, _, _ in config.layers]
        super().__init__(unet, (*(f"{name}.to_q" for name in layers), *map(place_of, layers)))

    def raw(self) -> Mapping[str, torch.Tensor]:
        """Outputs of the tapped modules by name."""
        return dict(self._outputs)


class Presence(nn.Module):
    """Image queries, mask logits and object queries -> a logit for each object: above 0 it is there.

    Args:
        config: sizes.

    Its keys are the UNet's own, of which it keeps a copy, so that a head's file has all that belongs to it.
    """

    def __init__(self, config: PresenceConfig):
        super().__init__()
        self.config = config
        self.to_k = nn.ModuleList(nn.Linear(config.text_dim, size, bias=False) for _, _, size in config.layers)
        self.register_buffer("template", torch.zeros(config.words, config.text_dim))
        self.register_buffer("weight", torch.zeros(2 * len(config.layers)))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def of(cls, unet: nn.Module, template: torch.Tensor, layers: Iterable[str] = ()) -> Presence:
        """Not calibrated yet. `template` are the states [T,D] of the words before a name, with the begin token."""
        presence = cls(PresenceConfig.for_unet(unet, len(template), layers))
        presence.template.copy_(template)
        for to_k, (name, _, _) in zip(presence.to_k, presence.config.layers, strict=True):
            to_k.weight.data.copy_(unet.get_submodule(name).to_k.weight)
        return presence.eval().requires_grad_(False)

    def taps(self, unet: nn.Module) -> PresenceTaps:
        """What captures its inputs."""
        return PresenceTaps(unet, self.config)

    def shares(self, layer: int, tapped: Mapping[str, torch.Tensor], queries: torch.Tensor) -> torch.Tensor:
        """What the cells of a layer give each object, alone against the template's words: [B,O,h,w]."""
        name, heads, channels = self.config.layers[layer]
        place = tapped[place_of(name)]
        rows, _, height, width = place.shape
        # Written with the sizes of the place, which the exporter can tell from the batch; those of to_q it cannot.
        image = conditional(tapped[f"{name}.to_q"].reshape(rows, height * width, channels)).float()
        split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [...,heads,n,d]
        q = split(image) * (channels // heads) ** -0.5
        words = split(self.to_k[layer](self.template))  # [heads,T,d]
        asked = split(self.to_k[layer](queries))  # [B,heads,O,d]
        odds = q @ asked.transpose(-1, -2) - (q @ words.transpose(-1, -2)).logsumexp(-1, keepdim=True)
        return odds.sigmoid().mean(1).transpose(1, 2).unflatten(2, (height, width))

    def evidence(
        self, tapped: Mapping[str, torch.Tensor], mask_logits: torch.Tensor, queries: torch.Tensor
    ) -> torch.Tensor:
        """Log-odds [B,O,2 layers] of the attention inside the mask and outside, layer by layer."""
        inside = mask_logits.float().sigmoid()  # [B,O,h',w']
        weights = (inside, 1 - inside)
        found = []
        for layer in range(len(self.config.layers)):
            share = resize(self.shares(layer, tapped, queries), mask_logits.shape[2:])
            found += [(share * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=EPS) for weight in weights]
        means = torch.stack(found, -1).clamp(EPS, 1 - EPS)
        return means.log() - (1 - means).log()

    def forward(
        self, tapped: Mapping[str, torch.Tensor], mask_logits: torch.Tensor, queries: torch.Tensor
    ) -> torch.Tensor:
        """Presence logits.

        Args:
            tapped: as PresenceTaps gives it, of [unconditional x B; conditional x B].
            mask_logits: [B,O,h',w'], of the head.
            queries: [B,O,D].

        Returns:
            [B,O], above 0 where the object is rather there than not; those of padded rows mean nothing.
        """
        return (self.evidence(tapped, mask_logits, queries) * self.weight).sum(-1) + self.bias


def calibrate(presence: Presence, evidence: torch.Tensor, present: torch.Tensor, decay: float = 1e-3) -> None:
    """Fit the regression, by Newton's method, to evidence [N,K] of queries that are `present` [N] or not.

    Both kinds count the same, however many there are of each: the logit is that of even odds.

    Raises:
        UsageError: there are none of one kind.
    """
    if not present.any() or present.all():
        raise UsageError("presence is calibrated on names that are in an image and on names that are not; give both")
    x, y = evidence.double(), present.double()
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    z = torch.cat([(x - mean) / spread, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # [N,K+1]
    count = torch.where(present, 0.5 / y.mean(), 0.5 / (1 - y.mean())) / len(y)
    penalty = torch.full((z.shape[1],), decay, dtype=x.dtype)
    penalty[-1] = 0
    w = torch.zeros(z.shape[1], dtype=x.dtype)
    for _ in range(50):
        p = (z @ w).sigmoid()
        slope = z.T @ (count * (p - y)) + penalty * w
        curve = (z * (count * p * (1 - p))[:, None]).T @ z + penalty.diag() + 1e-9 * torch.eye(len(w), dtype=x.dtype)
        w = w - torch.linalg.solve(curve, slope)
    presence.weight.copy_((w[:-1] / spread).float())
    presence.bias.copy_((w[-1] - (w[:-1] * mean / spread).sum()).float())
