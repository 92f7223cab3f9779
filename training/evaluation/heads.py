"""The heads that are measured: each trained from a recipe by the trainer of gd-train head, once, and found again."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.training.evaluation.lab import Lab, key_of
from grounded_diffusion.training.grounding.batches import Pool
from grounded_diffusion.training.grounding.config import HeadTraining
from grounded_diffusion.training.grounding.head import CALIBRATION, hold_back, spread
from grounded_diffusion.training.grounding.presence import fit_presence
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.grounding.store import Example, ExampleSet
from grounded_diffusion.training.grounding.train import LENGTH, HeadTrainer
from grounded_diffusion.training.grounding.validate import Validation
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.presence import Presence


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides a head.

    Attributes:
        split: names; the seen ones are trained on.
        training: settings.
        examples: generated images; 0 for none.
        pair_share: share of them with two objects.
        missed: share of their masks that the labeller misses: on top of what it misses by itself.
        timestep: at which the head reads; None for the model's own.
        real: folder of gd-train real, trained on as well.
    """

    split: Split
    training: HeadTraining
    examples: int = 2000
    pair_share: float = 0.5
    missed: float = 0.0
    timestep: int | None = None
    real: Path | None = None


class MissingMasks(Pool):
    """Examples some of whose masks are empty, as if the detector had not found the object: the same ones every time.

    Args:
        sets: see Pool.
        share: of the masks that are missing.
    """

    def __init__(self, sets: list[ExampleSet], share: float):
        super().__init__(sets)
        self.share = share

    def __getitem__(self, k: int) -> Example:
        example = super().__getitem__(k)
        _, place = self.places[k]
        lost = [missed(f"{place}:{name}", self.share) for name in example.names]
        return replace(example, masks=example.masks & ~np.array(lost)[:, None, None])


def missed(what: str, share: float) -> bool:
    """Whether a mask is among those that are missing."""
    return int.from_bytes(hashlib.sha256(what.encode()).digest()[:4]) < share * 2**32


def describe(lab: Lab, recipe: Recipe) -> dict[str, Any]:
    """What a head is found again by; a training that goes on for longer is the same one."""
    training = {key: value for key, value in asdict(recipe.training).items() if key not in LENGTH}
    labeller = lab.detectors.labeller or lab.detectors.judge
    return dict(
        base=lab.base.digest, split=asdict(recipe.split), training=training, iterations=recipe.training.iterations,
        examples=recipe.examples, pair_share=recipe.pair_share, missed=recipe.missed, timestep=recipe.timestep,
        real=recipe.real and recipe.real.name, options=asdict(lab.options),
        labeller=lab.detector(labeller, recipe.split.seen).about,
    )  # fmt: skip


def train_presence(lab: Lab, recipe: Recipe, head: GroundingHead) -> Presence:
    """What tells whether names are there, for a head, from the generated images of a recipe."""
    found = ExampleSet(lab.examples(recipe.split, recipe.examples, recipe.pair_share, timestep=recipe.timestep))
    presence, told = fit_presence(lab.base, head, spread(found, CALIBRATION), recipe.split.seen)
    lab.say(f"presence: {told.line()}")
    return presence


def train_head(lab: Lab, recipe: Recipe) -> GroundingHead:
    """The head of a recipe, in evaluation mode: trained now, to its end, or found.

    Raises:
        UsageError: the labeller lacks a seen name, or damaged examples.
    """
    from accelerate import Accelerator

    sets = []
    if recipe.examples:
        folder = lab.examples(recipe.split, recipe.examples, recipe.pair_share, timestep=recipe.timestep)
        sets.append(ExampleSet(folder))
    if recipe.real is not None:
        sets.append(ExampleSet(recipe.real))
    pool = MissingMasks(sets, recipe.missed) if recipe.missed else Pool(sets)
    rest, kept = hold_back(len(pool), recipe.training)
    held = [pool[k] for k in kept]
    pool.places = [pool.places[k] for k in rest]
    validation = Validation(lab.base, held, recipe.split.seen) if held else None
    folder = lab.out / "heads" / key_of(describe(lab, recipe))
    accelerator = Accelerator(cpu=lab.device == "cpu")
    trainer = HeadTrainer(lab.base, pool, recipe.training, folder, validation, accelerator, lab.say)
    return trainer.run().to(lab.base.device)
