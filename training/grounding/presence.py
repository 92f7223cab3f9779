"""Calibrating presence: queries of names that the detector found in an image, and negative queries of others.

Negative queries are seen names that are not in the image's prompt. Unseen names are never asked for: told that they are
absent, it would learn to leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import inputs_of
from grounded_diffusion.training.grounding.prompts import mixed
from grounded_diffusion.training.grounding.store import Example
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.presence import CELLS, Presence, calibrate
from grounded_diffusion.training.head.queried import cross_attentions

NEGATIVES = (0, 1, 4)  # asked for beside an image's names, in turn: the decoder's states hang on what else is asked
LEAST = 0.4  # of the best layer's gap; weaker layers are not read
CALL = 16  # images to one call of the network


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came of it, on the examples that it was made of.

    Attributes:
        queries: how many were asked, present and absent.
        kept: share of the present ones that are said to be there.
        passed: share of the absent ones that are said to be there all the same.
    """

    queries: int
    kept: float
    passed: float

    def line(self) -> str:
        """In one line."""
        return f"{self.kept:.1%} of names that are there are kept, {self.passed:.1%} of others pass"


def strangers(names: Sequence[str], known: Sequence[str], place: int, count: int) -> list[str]:
    """Names that are not among those of an image, others for every image."""
    return mixed([name for name in known if name not in names], place, "absent")[:count]


@torch.no_grad()
def gather(
    base: FrozenBase, head: GroundingHead, presence: Presence, examples: Sequence[Example], seen: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(evidence [N,K], present [N]) of all queries of some examples; objects that were not found are left out."""
    index = {name: k for k, name in enumerate(seen)}
    states, rows = base.queries(list(seen)), []
    by_count: dict[int, list[tuple[int, Example]]] = {}
    for place, example in enumerate(examples):
        if all(name in index for name in example.names):
            by_count.setdefault(len(example.names), []).append((place, example))
    for group in by_count.values():
        for start in range(0, len(group), CALL):
            part = group[start : start + CALL]
            read = reader(base, head, presence, [e for _, e in part])
            for count in NEGATIVES:
                asked = [[*e.names, *strangers(e.names, seen, place, count)] for place, e in part]
                evidence = read(states[torch.tensor([[index[name] for name in names] for names in asked])])
                for b, (_, example) in enumerate(part):
                    for o in range(len(asked[b])):
                        there = o < len(example.names)
                        if not there or example.masks[o].any():
                            rows.append((evidence[b, o], there))
    if not rows:
        raise UsageError("presence is calibrated on examples of seen names, and there are none")
    return torch.stack([row for row, _ in rows]).cpu(), torch.tensor([there for _, there in rows])


@torch.no_grad()
def reader(
    base: FrozenBase, head: GroundingHead, presence: Presence, examples: Sequence[Example]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes queries [B,O,D], asked of these examples, and gives their evidence [B,O,K]."""
    latents, timesteps = inputs_of(examples)
    with head.taps(base.unet) as taps, presence.taps(base.unet) as more:
        features = base.features(latents, [example.prompt for example in examples], timesteps, taps)

    @torch.no_grad()
    def read(queries: torch.Tensor) -> torch.Tensor:
        valid = torch.ones(queries.shape[:2], dtype=torch.bool, device=base.device)
        logits, states = head.with_states(features, queries, valid)
        return presence.evidence(more.raw(), logits, queries, states)

    return read


@torch.no_grad()
def fill_bank(base: FrozenBase, presence: Presence, examples: Sequence[Example]) -> None:
    """Fill the bank of cells with random ones of these examples, of each as many."""
    examples = examples[:CELLS]
    each, generator = -(-CELLS // len(examples)), torch.Generator().manual_seed(0)
    found: list[list[torch.Tensor]] = [[] for _ in presence.bank]
    for start in range(0, len(examples), CALL):
        part = examples[start : start + CALL]
        latents, timesteps = inputs_of(part)
        with presence.taps(base.unet) as taps:
            base.call(latents, [example.prompt for example in part], timesteps)
        for layer, cells in enumerate(found):
            rows = presence.image_queries(layer, taps.raw())  # [B,n,C]
            chosen = torch.randint(rows.shape[1], (len(part), each), generator=generator).to(rows.device)
            cells.append(rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1))
    for bank, cells in zip(presence.bank, found, strict=True):
        bank.copy_(torch.cat(cells)[:CELLS])


def fit_presence(
    base: FrozenBase, head: GroundingHead, examples: Sequence[Example], seen: Sequence[str]
) -> tuple[Presence, Calibration]:
    """A calibrated presence for a trained head, of the layers that tell names apart; nothing of the head changes.

    Raises:
        UsageError: the UNet has no cross-attention, or no example has a seen name that was found.
    """
    template = base.template_states()
    every = Presence.of(base.unet, template, head.config.embed_dim).to(base.device)
    fill_bank(base, every, examples)
    evidence, present = gather(base, head, every, examples, seen)
    spread = evidence.std(0).clamp(min=1e-6)
    gaps = (evidence[present].mean(0) - evidence[~present].mean(0)) / spread
    gaps = gaps[: every.config.shares : 3]  # inside the mask, of each layer
    kept = [k for k, gap in enumerate(gaps.tolist()) if gap >= LEAST * gaps.max()]
    layers = [cross_attentions(base.unet)[k] for k in kept]
    chosen = Presence.of(base.unet, template, head.config.embed_dim, layers)
    for bank, k in zip(chosen.bank, kept, strict=True):
        bank.copy_(every.bank[k])
    columns = [column for k in kept for column in range(3 * k, 3 * k + 3)]
    evidence = evidence[:, [*columns, *range(every.config.shares, evidence.shape[1])]]
    calibrate(chosen, evidence, present)
    said = chosen.classify(evidence) > 0
    return chosen.to(base.device), Calibration(
        len(present), said[present].float().mean().item(), said[~present].float().mean().item()
    )
