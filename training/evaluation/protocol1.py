"""Protocol-I: how well a method masks what the model draws, in groups by what its head was trained on.

Images are of a vocabulary, not of a split: heads of all splits are measured on the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from grounded_diffusion.training.evaluation.images import TestImages, exact_images, oracle_images
from grounded_diffusion.training.evaluation.lab import Figures, Lab, key_of
from grounded_diffusion.training.evaluation.methods import Method
from grounded_diffusion.training.evaluation.tally import Tally, percent
from grounded_diffusion.training.grounding.annotations import Annotations
from grounded_diffusion.training.grounding.prompts import mixed
from grounded_diffusion.training.grounding.real import make_real
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.metrics import grid_ceiling
from grounded_diffusion.training.things.scenes import Scenes

CALL = 16  # images to one call of the network
CEILING = 400  # masks that the ceiling is fitted to, at most
SEED = 20_000  # of images to measure on; those to train on have others


@dataclass(frozen=True, slots=True)
class TestSize:
    """How many images.

    Attributes:
        per_name, per_pair: of each; the paper's PASCAL-sim has 30 and 5.
        agreement: least IoU of the two detectors' masks.
    """

    per_name: int = 30
    per_pair: int = 5
    agreement: float = 0.75

    __test__ = False


@dataclass(slots=True)
class Measured:
    """What came of one method on one set of images.

    Attributes:
        figures: see Tally.figures.
        by_name: IoU by name, images of one object, per cent.
        scores: (place, group, IoU) of every image.
    """

    figures: Figures
    by_name: dict[str, float] = field(default_factory=dict)
    scores: list[tuple[int, str, float]] = field(default_factory=list)


def fewer_pairs(splits: Mapping[str, Split], most: int) -> dict[str, Split]:
    """The splits with the same pairs, at most so many of them; 0 for all.

    A third are of the unseen names of one split or another, which are few, as far as there are such pairs.
    """
    pairs = mixed(next(iter(splits.values())).pairs, 0, "pairs")
    if not most or most >= len(pairs):
        return dict(splits)
    rare = [pair for pair in pairs if any(set(pair) <= set(split.unseen) for split in splits.values())]
    taken = rare[: max(1, most // 3)]
    taken += [pair for pair in pairs if pair not in taken][: most - len(taken)]
    return {name: replace(split, pairs=tuple(taken)) for name, split in splits.items()}


def judged_folder(lab: Lab, split: Split, size: TestSize, timestep: int | None = None) -> Path:
    """Generated images, so many of each name and pair. They are those of every split of a vocabulary."""
    names = tuple(sorted((*split.seen, *split.unseen)))
    single, double = size.per_name * len(names), size.per_pair * len(split.pairs)
    whole, count = Split(names, (), split.pairs), single + double
    return lab.examples(whole, count, double / count, test=True, timestep=timestep, seed=SEED)


def make_oracle_images(lab: Lab, split: Split, size: TestSize) -> TestImages:
    """Those of them that the detectors find good."""
    second = lab.detectors.second and lab.detector(lab.detectors.second, tuple(sorted((*split.seen, *split.unseen))))
    return oracle_images(judged_folder(lab, split, size), second or None, size.agreement)


def make_exact_images(lab: Lab, annotations: Annotations, names: Sequence[str], limit: int | None = None) -> TestImages:
    """Annotated or rendered images with all of these names, by inversion."""
    config = dict(base=lab.base.digest, names=list(names), limit=limit, of=annotations.about)
    folder = lab.out / "images" / key_of(config)
    if not (folder / "examples.json").is_file():
        lab.say(f"images with known masks, in {folder}")
        make_real(
            annotations, Split(tuple(names)), lab.base, folder, size=lab.base.image_size, capture_timestep=1,
            limit=limit, say=lab.say,
        )  # fmt: skip
    return exact_images(folder, names)


def rendered(lab: Lab, split: Split, size: TestSize) -> Scenes:
    """Rendered scenes, as many as there are generated images."""
    names = (*split.seen, *split.unseen)
    return Scenes(names, split.pairs, size.per_name, size.per_pair, lab.base.image_size[0], seed=SEED)


def measure(method: Method, images: TestImages, split: Split, absent: Sequence[str] = ()) -> Measured:
    """Measure one method.

    Args:
        split: which names its head was trained on.
        absent: names to ask for that are not in an image; of each image one of them. Empty where none can be.
    """
    tally = Tally(frozenset(split.seen))
    for batch in images.batches(CALL):
        ask = method.look(batch)
        rows = [example.names for _, example in batch]
        for (place, example), masks in zip(batch, ask(rows), strict=True):
            tally.add(place, example.names, masks, torch.from_numpy(example.masks))
        if absent and method.any_name:
            asked = [(*names, stranger(names, absent, place)) for (place, _), names in zip(batch, rows, strict=True)]
            for masks in ask(asked):
                tally.add_absent(masks[-1])
    return Measured(tally.figures(), tally.by_name(), tally.scores)


def stranger(names: Sequence[str], all_names: Sequence[str], place: int) -> str:
    """A name that is not among those of an image, another for every image."""
    others = [name for name in all_names if name not in names]
    return others[(7 * place + 3) % len(others)]


def ceiling(images: TestImages) -> float:
    """The best mean IoU, per cent, that logits on the latent grid could reach on an image's masks."""
    places = [images.kept[i * len(images.kept) // CEILING] for i in range(CEILING)]
    masks = np.concatenate([images.examples[k].masks for k in dict.fromkeys(places)])
    masks = masks[masks.any((1, 2))][:CEILING]
    return percent(grid_ceiling(torch.from_numpy(masks), images.examples[0].latents.shape[1:]))


def average(tables: Sequence[Figures]) -> Figures:
    """The mean of each figure over the splits that have it; counts are added up."""
    figures: dict[str, list[float]] = {}
    for table in tables:
        for name, value in table.items():
            figures.setdefault(name, []).append(value)
    return {n: sum(found) if n.endswith("images") else round(mean(found), 2) for n, found in figures.items()}


def real_folder(lab: Lab, annotations: Annotations, split: Split, limit: int | None) -> Path:
    """Annotated images of seen names alone, to train on (Table 7)."""
    config = dict(base=lab.base.digest, train=list(split.seen), unseen=list(split.unseen), limit=limit)
    folder = lab.out / "images" / key_of({**config, "of": annotations.about})
    if not (folder / "examples.json").is_file():
        make_real(
            annotations, split, lab.base, folder, size=lab.base.image_size, capture_timestep=1, limit=limit, say=lab.say
        )
    return folder
