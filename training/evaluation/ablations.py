"""The paper's ablations: each a loop over heads that differ in one thing, measured on the same images.

timestep     Fig. 7   at which denoising step the head reads
zero-masks   Tab. 3   what is made of objects that the labeller does not find
objects      Tab. 5   images of one object, of two, or of both to train on
seen-names   Tab. 6   how many names to train on
real         Tab. 7   generated images, annotated ones, or both to train on
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.evaluation.heads import Recipe, describe, train_head
from grounded_diffusion.training.evaluation.images import TestImages, oracle_images
from grounded_diffusion.training.evaluation.lab import Figures, Lab, key_of
from grounded_diffusion.training.evaluation.methods import HeadMethod
from grounded_diffusion.training.evaluation.protocol1 import (
    judged_folder,
    make_exact_images,
    make_oracle_images,
    measure,
    real_folder,
)
from grounded_diffusion.training.evaluation.table import Plan, line
from grounded_diffusion.training.grounding.annotations import Annotations
from grounded_diffusion.training.grounding.splits import Split

TIMESTEPS = (1, 81, 201, 401, 601, 801)  # of training; the paper's axis counts steps of twenty
MISSED = 0.4  # share of masks that a labeller misses, on top of its own


@dataclass(frozen=True, slots=True)
class Trial:
    """One head of an ablation, and what it is measured on.

    Attributes:
        label: of the figures.
        recipe: of the head.
        images: of each track.
    """

    label: str
    recipe: Recipe
    images: Sequence[TestImages]


@dataclass(frozen=True, slots=True)
class Setting:
    """What ablations vary.

    Attributes:
        split: which is trained and measured on.
        timesteps: of `timestep`.
        missed: of `zero-masks`.
        counts: numbers of seen names, of `seen-names`; () for quarters of them.
        training: annotated images to train on, of `real`.
        training_limit: at most so many of them are looked at; None for all.
    """

    split: Split
    timesteps: Sequence[int] = TIMESTEPS
    missed: float = MISSED
    counts: Sequence[int] = ()
    training: Callable[[], Annotations] | None = None
    training_limit: int | None = None


def timestep(lab: Lab, plan: Plan, setting: Setting) -> Iterator[Trial]:
    """Fig. 7. The images are the same at every step: only what is kept of them differs."""
    usual = make_oracle_images(lab, setting.split, plan.size)
    for step in setting.timesteps:
        folder = judged_folder(lab, setting.split, plan.size, step)
        images = replace(oracle_images(folder, None, plan.size.agreement), kept=usual.kept)
        yield Trial(f"t{step}", recipe_of(plan, setting.split, timestep=step), [images])


def zero_masks(lab: Lab, plan: Plan, setting: Setting) -> Iterator[Trial]:
    """Tab. 3, with a labeller that misses as a real detector does."""
    images = [make_oracle_images(lab, setting.split, plan.size)]
    for name in ("trust", "skip"):
        recipe = recipe_of(plan, setting.split, missed=setting.missed)
        yield Trial(name, replace(recipe, training=replace(recipe.training, zero_masks=name)), images)


def objects(lab: Lab, plan: Plan, setting: Setting) -> Iterator[Trial]:
    """Tab. 5."""
    images = [make_oracle_images(lab, setting.split, plan.size)]
    for name, share in (("one", 0.0), ("two", 1.0), ("mixture", 0.5)):
        yield Trial(name, recipe_of(plan, setting.split, pair_share=share), images)


def seen_names(lab: Lab, plan: Plan, setting: Setting) -> Iterator[Trial]:
    """Tab. 6. Names that are not trained on are unseen: the paper's way."""
    images, seen = [make_oracle_images(lab, setting.split, plan.size)], setting.split.seen
    for count in setting.counts or quarters(len(seen)):
        if not 1 <= count <= len(seen):
            raise UsageError(f"{count} names cannot be seen: the split has {len(seen)}")
        fewer = [seen[i * len(seen) // count] for i in range(count)]  # evenly over the list
        split = replace(setting.split, seen=tuple(fewer), unseen=unseen_of(setting.split, fewer))
        yield Trial(f"seen{count}", recipe_of(plan, split), images)


def quarters(count: int) -> list[int]:
    """A quarter of the names, a half, three quarters, all."""
    return sorted({max(1, round(count * part / 4)) for part in (1, 2, 3, 4)})


def unseen_of(split: Split, seen: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in (*split.seen, *split.unseen) if name not in seen)


def real(lab: Lab, plan: Plan, setting: Setting) -> Iterator[Trial]:
    """Tab. 7, both halves: measured on generated images and on annotated ones."""
    if plan.annotations is None or setting.training is None:
        raise UsageError("this ablation needs annotated images; give --rendered, --voc or --coco")
    split = setting.split
    images = [make_oracle_images(lab, split, plan.size)]
    images.append(make_exact_images(lab, plan.annotations(), (*split.seen, *split.unseen), plan.limit))
    folder = real_folder(lab, setting.training(), split, setting.training_limit)
    for name, change in (("real", dict(examples=0, real=folder)), ("sim", {}), ("sim_real", dict(real=folder))):
        yield Trial(name, recipe_of(plan, split, **change), images)


TRIALS = {
    "timestep": timestep,
    "zero-masks": zero_masks,
    "objects": objects,
    "seen-names": seen_names,
    "real": real,
}


def recipe_of(plan: Plan, split: Split, **changes: Any) -> Recipe:
    """The plan's usual head, changed."""
    return replace(Recipe(split, plan.training, plan.examples), **changes)


def run_ablation(lab: Lab, plan: Plan, setting: Setting, name: str) -> Figures:
    """Figures `ablation.<name>.<label>.<track>.<group>`. The same call goes on where it was stopped."""
    training = plan.training
    told = f"Heads of {training.iterations} steps of {training.batch}, on {plan.examples:,} images."
    figures: Figures = {f"about.ablation.{name}": told}
    for trial in TRIALS[name](lab, plan, setting):
        for images in trial.images:
            found = measured(lab, trial, images)
            place = f"ablation.{name}.{trial.label}.{images.track}"
            figures |= {f"{place}.{key}": value for key, value in found.items()}
            lab.say(f"{name}, {trial.label}, {images.track}: {line(found)}")
            lab.publish(figures)
    return figures


def measured(lab: Lab, trial: Trial, images: TestImages) -> Figures:
    """What the head of a trial reaches on some images; found, or trained and measured now."""
    split = trial.recipe.split
    config = dict(
        head=describe(lab, trial.recipe), images=images.examples.folder.name, kept=key_of(images.kept), ablation=True
    )
    open_method = lambda: HeadMethod(lab.base, train_head(lab, trial.recipe))
    words = (*split.seen, *split.unseen)
    return lab.measured(config, lambda: asdict(measure(open_method(), images, split, words)))["figures"]
