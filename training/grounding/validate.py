"""What a head is worth while it trains: mIoU against the detector, on seen names and on unseen ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import collate
from grounded_diffusion.training.grounding.store import Example
from grounded_diffusion.training.head.head import GroundingHead, upsample_logits
from grounded_diffusion.training.head.taps import Taps
from grounded_diffusion.training.metrics import PooledIoU


@dataclass(frozen=True, slots=True)
class Measured:
    """mIoU from 0 to 1, of seen and unseen names; None where there is no example of them."""

    seen: float | None
    unseen: float | None
    by_name: dict[str, float]

    @property
    def score(self) -> float:
        """What the best head is chosen by: seen names, since choosing by unseen ones would be seeing them."""
        return self.seen or 0.0

    def values(self) -> dict[str, float]:
        """What is known, by name."""
        known = {"miou_seen": self.seen, "miou_unseen": self.unseen}
        return {key: value for key, value in known.items() if value is not None}

    def line(self) -> str:
        """In one line."""
        known = {"seen": self.seen, "unseen": self.unseen}
        shown = [f"{100 * value:.1f} {key}" for key, value in known.items() if value is not None]
        return f"mIoU {', '.join(shown) or 'unknown: the detector found nothing'}"


class Validation:
    """Examples that the head is measured on; objects that the detector did not find are left out.

    Args:
        base: the frozen model.
        examples: all of them; nothing of them is trained on.
        seen: names the head is trained on; all others are unseen.
        batch: examples to one call.
    """

    def __init__(self, base: FrozenBase, examples: Sequence[Example], seen: Sequence[str], batch: int = 8):
        self.base, self.examples, self.seen, self.batch = base, list(examples), set(seen), batch
        names = dict.fromkeys(name for example in self.examples for name in example.names)
        self.index = {name: i for i, name in enumerate(names)}
        self.queries = base.queries(list(self.index)) if names else None

    @torch.no_grad()
    def predict(self, head: GroundingHead, taps: Taps, examples: Sequence[Example]) -> torch.Tensor:
        """The head's masks, bool [B,O,H,W]."""
        batch, device = collate(examples, self.index), self.base.device
        features = self.base.features(batch.latents, batch.prompts, batch.timesteps, taps)
        logits = head(features, self.queries[batch.names.to(device)], batch.valid.to(device))
        return (upsample_logits(logits.float(), batch.masks.shape[-2:]) > 0).cpu()

    def measure(self, head: GroundingHead, taps: Taps) -> Measured:
        """mIoU over all examples; `head` is in evaluation mode, `taps` entered on the base's UNet."""
        pooled = PooledIoU()
        for start in range(0, len(self.examples), self.batch):
            examples = self.examples[start : start + self.batch]
            for example, masks in zip(examples, self.predict(head, taps, examples), strict=True):
                for name, truth, predicted in zip(example.names, example.masks, masks, strict=False):
                    if truth.any():
                        pooled.add(name, predicted, torch.from_numpy(truth))
        by_name = pooled.by_name()
        return Measured(pooled.mean(self.seen), pooled.mean(by_name.keys() - self.seen), by_name)
