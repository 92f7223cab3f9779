"""Whether an object is in an image at all: what the UNet's own cross-attention says of it, and the head's own state.

The head draws a mask for every query, also for an object that is not there, and draws it with confidence. What gives
such a mask away is the attention that its query gets: an object's query k_o against the words that stand before a name
in the query's template ("a photograph of a"), at every cell of the image, averaged over a layer's heads,

    s_o = exp(Q k_o / sqrt d) / (sum over template words w of exp(Q k_w / sqrt d) + exp(Q k_o / sqrt d)).

A layer gives three numbers: the mean of s_o weighted by the mask's probability, weighted by the rest, and over cells
of other images, since some names get more of it than others wherever they are asked. Their log-odds, and the state that
the head's decoder has of the object, go through a small network, calibrated on queries of names that are in an image
and of others that are not. The state is often left out there, so that the attention still counts for a name that it was
not calibrated on, of which the state says less.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.head.layers import resize
from grounded_diffusion.training.head.queried import Layers, Queried, layers_of, read_layers, tapped_modules
from grounded_diffusion.training.head.taps import ModuleOutputs

EPS = 1e-4  # of shares, before their log-odds
CELLS = 256  # of other images, which every name is compared with
HIDDEN = 64  # width of the network
STEPS, BATCH, RATE, DECAY, DROPOUT = 1000, 256, 2e-3, 0.05, 0.2  # of its training
LOST = 5.0  # a data set's price of an object that is there and is left out, in strangers that are not
STATE_LEFT_OUT = 0.3  # share of queries of which only the attention is seen


@dataclass(frozen=True, slots=True)
class PresenceConfig:
    """Which attention is read.

    Attributes:
        layers: (cross-attention module, heads, channels of its queries) of each layer.
        words: of the template, with the begin token.
        text_dim: width of a query.
        object_dim: width of the decoder's state of an object.
    """

    layers: Layers
    words: int
    text_dim: int
    object_dim: int

    def __post_init__(self):
        object.__setattr__(self, "layers", read_layers(self.layers))
        if not self.layers:
            raise UsageError("presence needs a cross-attention layer to read; this UNet has none")

    @classmethod
    def for_unet(cls, unet: nn.Module, words: int, object_dim: int, layers: Iterable[str] = ()) -> PresenceConfig:
        """Of these cross-attention modules of a UNet, or of all that it has."""
        return cls(layers_of(unet, layers), words, unet.config.cross_attention_dim, object_dim)

    @property
    def shares(self) -> int:
        """Numbers that the layers give of an object; the decoder's state stands behind them in the evidence."""
        return 3 * len(self.layers)


class PresenceTaps(ModuleOutputs):
    """Captures image queries and their layers' resolution while it is entered; see Taps."""

    def __init__(self, unet: nn.Module, config: PresenceConfig):
        super().__init__(unet, tapped_modules(config.layers))

    def raw(self) -> Mapping[str, torch.Tensor]:
        """Outputs of the tapped modules by name."""
        return dict(self._outputs)


class Presence(Queried):
    """Image queries, mask logits, object queries and states -> a logit for each object: above 0 it is there.

    Args:
        config: sizes.
    """

    def __init__(self, config: PresenceConfig):
        super().__init__(config.layers, config.words, config.text_dim)
        self.config = config
        self.bank = nn.ParameterList(nn.Parameter(torch.zeros(CELLS, size)) for _, _, size in config.layers)
        evidence = config.shares + config.object_dim
        self.register_buffer("mean", torch.zeros(evidence))
        self.register_buffer("spread", torch.ones(evidence))
        self.hidden, self.out = nn.Linear(evidence, HIDDEN), nn.Linear(HIDDEN, 1)

    @classmethod
    def of(cls, unet: nn.Module, template: torch.Tensor, object_dim: int, layers: Iterable[str] = ()) -> Presence:
        """Not calibrated yet, its bank empty. `template` are the states [T,D] of the words before a name, with the
        begin token."""
        presence = cls(PresenceConfig.for_unet(unet, len(template), object_dim, layers))
        presence.read(unet, template)
        return presence.eval().requires_grad_(False)

    def taps(self, unet: nn.Module) -> PresenceTaps:
        """What captures its inputs."""
        return PresenceTaps(unet, self.config)

    def shares(self, layer: int, queries: torch.Tensor, *cells: torch.Tensor) -> list[torch.Tensor]:
        """What cells [B or 1,n,C] of a layer give each object, alone against the template's words: [B,O,n] each."""
        return [odds.sigmoid().mean(1).transpose(1, 2) for odds in self.odds(layer, queries, *cells)]

    def evidence(
        self, tapped: Mapping[str, torch.Tensor], mask_logits: torch.Tensor, queries: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """Log-odds of the attention inside the mask, outside, and elsewhere, layer by layer, and the object's state:
        [B,O,3 layers + E]; the arguments are forward's."""
        logits = mask_logits.float()
        # Probabilities inside and outside, [B,O,h'w'] each, that add up to 1. From their logarithms: those of a nearly
        # empty mask are so small that runtimes' sigmoids have no digit of them right.
        parts = [(-F.softplus(-side)).flatten(2).softmax(-1) for side in (logits, -logits)]
        found = []
        for layer in range(len(self.config.layers)):
            here, elsewhere = self.shares(layer, queries, self.image_queries(layer, tapped), self.bank[layer][None])
            share = resize(here.unflatten(2, self.place(layer, tapped)), mask_logits.shape[2:]).flatten(2)
            found += [(share * part).sum(-1) for part in parts]
            found.append(elsewhere.mean(-1))
        means = torch.stack(found, -1).clamp(EPS, 1 - EPS)
        return torch.cat([means.log() - (1 - means).log(), states.float()], -1)

    def classify(self, evidence: torch.Tensor) -> torch.Tensor:
        """Presence logits [...] of evidence [...,K]."""
        return self.out(F.relu(self.hidden((evidence - self.mean) / self.spread))).squeeze(-1)

    def forward(
        self, tapped: Mapping[str, torch.Tensor], mask_logits: torch.Tensor, queries: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """Presence logits.

        Args:
            tapped: as PresenceTaps gives it, of [unconditional x B; conditional x B].
            mask_logits: [B,O,h',w'], of the head.
            queries: [B,O,D].
            states: [B,O,E], of the head's decoder.

        Returns:
            [B,O], above 0 where the object is rather there than not; those of padded rows mean nothing.
        """
        return self.classify(self.evidence(tapped, mask_logits, queries, states))


def calibrate(presence: Presence, evidence: torch.Tensor, present: torch.Tensor, seed: int = 0) -> None:
    """Train the network on evidence [N,K] of queries that are `present` [N] or not.

    Both kinds count the same, however many there are of each, but that it is LOST times as bad to lose an object as to
    pass a stranger.

    Raises:
        UsageError: there are none of one kind.
    """
    if not present.any() or present.all():
        raise UsageError("presence is calibrated on names that are in an image and on names that are not; give both")
    presence.mean.copy_(evidence.mean(0))
    presence.spread.copy_(evidence.std(0).clamp(min=1e-2))
    counts = torch.where(present, LOST / present.float().mean(), 1 / (~present).float().mean()) / (LOST + 1)
    shares = torch.arange(evidence.shape[1]) < presence.config.shares
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for layer in (presence.hidden, presence.out):
            layer.reset_parameters()
        weights = [*presence.hidden.parameters(), *presence.out.parameters()]
        optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in weights], RATE, weight_decay=DECAY)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            rows = torch.randint(len(evidence), (BATCH,))
            x = (evidence[rows] - presence.mean) / presence.spread
            x = x * (shares | (torch.rand(BATCH, 1) > STATE_LEFT_OUT))
            logits = presence.out(F.dropout(F.relu(presence.hidden(x)), DROPOUT)).squeeze(-1)
            loss = F.binary_cross_entropy_with_logits(logits, present[rows].float(), counts[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    presence.requires_grad_(False)
