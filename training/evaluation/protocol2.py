"""Protocol-II: how well a segmentation network does that has learnt from nothing but generated images and their masks.

Images of the model's own are masked by a method, a network is trained on them, and it is tested on images whose masks
are known: the paper's Table 2. The same network on exact masks of such images is what it could reach at best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image

from grounded_diffusion.files import readable_errors
from grounded_diffusion.training.detectors.labels import match_labels
from grounded_diffusion.training.detectors.network import BACKGROUND, Network, train_network
from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter
from grounded_diffusion.training.evaluation.daam import TAUS, Daam
from grounded_diffusion.training.evaluation.images import TestImages, oracle_images
from grounded_diffusion.training.evaluation.lab import Figures, Lab, key_of
from grounded_diffusion.training.evaluation.methods import Ask, Batch, HeadMethod, Method, Rows
from grounded_diffusion.training.evaluation.paper import KINDS
from grounded_diffusion.training.evaluation.protocol1 import CALL, average, measure
from grounded_diffusion.training.evaluation.table import Bench, Plan, seen_score
from grounded_diffusion.training.evaluation.tally import percent
from grounded_diffusion.training.grounding.annotations import Annotations
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.grounding.store import ExampleSet
from grounded_diffusion.training.metrics import confusion, confusion_iou
from grounded_diffusion.training.things.scenes import Scenes

SEED = 30_000  # of images to train networks on; heads are trained on others, and measured on others


class Labelled(Protocol):
    """Images with class maps."""

    def __len__(self) -> int: ...

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k-th image, uint8 [H,W,3], and its class map, uint8 [H,W]."""
        ...


def class_map(masks: Sequence[np.ndarray], classes: Sequence[int]) -> np.ndarray:
    """Masks bool [O,H,W] of classes -> uint8 [H,W], 0 for the background; where two meet, the smaller is in front."""
    drawn = np.zeros(masks[0].shape, np.uint8)
    for mask, k in sorted(zip(masks, classes, strict=True), key=lambda pair: -pair[0].sum()):
        drawn[mask] = k
    return drawn


class Generated:
    """Examples whose class maps are in a file. See Labelled."""

    def __init__(self, examples: ExampleSet, maps: Path):
        self.examples, self.maps = examples, np.load(maps, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.examples.image(k), np.array(self.maps[k])


class Known:
    """Annotated images of these names. See Labelled.

    Args:
        size: (H, W) of all of them, to train on; None leaves each its own.
        limit: the first so many; None takes all.
    """

    def __init__(
        self, annotations: Annotations, names: Sequence[str], size: tuple[int, int] | None = None,
        limit: int | None = None,
    ):  # fmt: skip
        self.annotations, self.size = annotations, size
        self.count = min(len(annotations), limit or len(annotations))
        labels = match_labels(names, annotations.labels, {})
        self.classes = {label: k for k, name in enumerate(names, 1) for label in labels[name]}

    def __len__(self) -> int:
        return self.count

    def read(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        image, masks = self.annotations.read(k)
        known = {label: mask for label, mask in masks.items() if label in self.classes}
        blank = np.zeros(image.size[::-1], np.uint8)
        drawn = class_map(list(known.values()), [self.classes[label] for label in known]) if known else blank
        if self.size:
            wide = self.size[::-1]
            image, drawn = image.resize(wide), np.asarray(Image.fromarray(drawn).resize(wide, Image.Resampling.NEAREST))
        return np.asarray(image), drawn


class Judged:
    """The masks that the judge has found. See methods.Method."""

    any_name = False

    def look(self, batch: Batch) -> Ask:
        def ask(names: Rows) -> list[torch.Tensor]:
            return [torch.from_numpy(example.masks) for _, example in batch]

        return ask


@dataclass(frozen=True, slots=True)
class Study:
    """What Protocol-II compares.

    Attributes:
        plan: splits, heads, and how many images of each name and each pair.
        network: what is trained on them.
        test: the images that networks are tested on.
        exact: gives as many images with known masks, to train on; None leaves the bound out.
        kinds: of paper.KINDS and in its order, for the plan's head; the other methods have the last of them.
    """

    plan: Plan
    network: Network
    test: Annotations
    exact: Callable[[], Annotations] | None = None
    kinds: tuple[str, ...] = KINDS


def names_of(split: Split) -> tuple[str, ...]:
    """All names, in the order of the networks' labels: the same for every split of a vocabulary."""
    return tuple(sorted((*split.seen, *split.unseen)))


def scenes(lab: Lab, plan: Plan, count: int) -> tuple[Scenes, Callable[[], Scenes]]:
    """Rendered scenes to test on, half of them of two objects; and what draws as many to train on as are generated."""
    split = next(iter(plan.splits.values()))
    names, size = names_of(split), lab.base.image_size[0]
    half = count / 2 if split.pairs else count
    each = lambda entries: max(1, round(half / len(entries))) if entries else 0
    test = Scenes(names, split.pairs, each(names), each(split.pairs), size, seed=SEED)
    return test, lambda: Scenes(names, split.pairs, plan.size.per_name, plan.size.per_pair, size, seed=SEED + 1)


def folders(lab: Lab, plan: Plan, kind: str) -> list[Path]:
    """Generated images of all names: of one object, of two, or both."""
    split = next(iter(plan.splits.values()))
    names = names_of(split)
    whole = Split(names, (), split.pairs)
    counts = {"one": plan.size.per_name * len(names), "two": plan.size.per_pair * len(split.pairs)}
    return [
        lab.examples(whole, count, float(one == "two"), test=True, seed=SEED)
        for one, count in counts.items()
        if count and kind in (one, "mixture")
    ]


def everything(folder: Path) -> TestImages:
    found = ExampleSet(folder)
    return TestImages("oracle", found, tuple(range(len(found))))


class Masker(NamedTuple):
    """Who masks generated images: what that is found again by, and how it is opened for a folder of them."""

    key: Any
    open: Callable[[Path], Method]


def masker(lab: Lab, study: Study, method: str, split: Split, paths: Sequence[Path]) -> Masker:
    """A method by its name, for some folders of images."""
    if method == "judge":
        return Masker("judge", lambda folder: Judged())
    if method == "daam":
        return daam_masker(lab, paths, split, study.plan.size.agreement)
    entry = Bench(lab, study.plan, []).entry(method, split)

    def opened(folder: Path) -> Method:
        head = cast(HeadMethod, entry.open())
        head.exclusive = True  # as gd-infer writes class maps
        return head

    return Masker(["exclusive", entry.key], opened)


def daam_masker(lab: Lab, paths: Sequence[Path], split: Split, agreement: float) -> Masker:
    """DAAM at the threshold that is best on the seen names of these images."""

    def daam(folder: Path) -> Daam:
        file = lab.out / "daam" / f"{folder.name}-all.npz"
        return Daam(lab.base, everything(folder), lab.options, file, CALL, lab.say)

    def best() -> Figures:
        scores = dict.fromkeys(TAUS, 0.0)
        for folder in paths:
            images, maps = oracle_images(folder, None, agreement), daam(folder)
            for tau in TAUS:
                scores[tau] += seen_score(measure(maps.at(tau), images, split).figures)
        return {"tau": max(TAUS, key=scores.__getitem__)}

    tau = lab.measured(["daam's tau", [folder.name for folder in paths], list(split.seen)], best)["tau"]
    return Masker(["daam", tau], lambda folder: daam(folder).at(tau))


def masked(lab: Lab, folder: Path, by: Masker, names: Sequence[str]) -> Generated:
    """A folder's images with a method's masks as class maps, made now or found."""
    images, file = everything(folder), lab.out / "maps" / f"{key_of([folder.name, by.key, list(names)])}.npy"
    if not file.is_file():
        method, classes = by.open(folder), {name: k for k, name in enumerate(names, 1)}
        part, size = file.with_suffix(".part"), images.examples[0].masks.shape[1:]
        lab.say(f"masks of {len(images.examples)} images, in {file}")
        with readable_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            maps = open_memmap(part, mode="w+", dtype=np.uint8, shape=(len(images.examples), *size))
            for batch in images.batches(CALL):
                rows = [example.names for _, example in batch]
                for (place, _), row, found in zip(batch, rows, method.look(batch)(rows), strict=True):
                    maps[place] = class_map(found.numpy(), [classes[name] for name in row])
            maps.flush()
            part.replace(file)
    return Generated(images.examples, file)


def drawer(sets: Sequence[Labelled]) -> Callable[[int, torch.Generator], tuple[np.ndarray, np.ndarray]]:
    """Draws batches from several sets, each image as likely as any other, and half of them mirrored."""
    places = [(one, k) for one in sets for k in range(len(one))]

    def draw(count: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = torch.randint(len(places), (count,), generator=generator).tolist()
        mirrored = (torch.rand(count, generator=generator) < 0.5).numpy()
        read = [one.read(k) for one, k in (places[i] for i in chosen)]
        images, maps = (np.stack(part) for part in zip(*read, strict=True))
        images[mirrored], maps[mirrored] = images[mirrored, :, ::-1], maps[mirrored, :, ::-1]
        return images, maps

    return draw


def iou_by_name(segmenter: TransformersSegmenter, test: Labelled, names: Sequence[str]) -> Figures:
    """IoU of every name and of the background, per cent, pooled over the images; names in none of them are left out."""
    labels = (BACKGROUND, *names)
    counts = torch.zeros(len(labels), len(labels), dtype=torch.long)
    for k in range(len(test)):
        image, truth = test.read(k)
        found = segmenter.class_maps(image[None])[0]
        counts += confusion(torch.from_numpy(found), torch.from_numpy(truth).long(), len(labels))
    pairs = zip(labels, counts.sum(1).tolist(), confusion_iou(counts).tolist(), strict=True)
    return {label: percent(iou) for label, pixels, iou in pairs if pixels}


def grouped(iou: Mapping[str, float], split: Split) -> Figures:
    """Table 2's columns from the IoU of every name: seen, unseen, their harmonic mean; and all with the background."""
    seen, unseen = ([iou[name] for name in names if name in iou] for names in (split.seen, split.unseen))
    figures = {"with_background": round(mean(iou.values()), 2)}
    for label, values in (("seen", seen), ("unseen", unseen)):
        if values:
            figures[label] = round(mean(values), 2)
    if seen and unseen:
        figures["harmonic"] = round(harmonic_mean([figures["seen"], figures["unseen"]]), 2)
    return figures


def run_protocol2(lab: Lab, study: Study) -> Figures:
    """Figures `protocol2.[<method>.][<split>.]<kind>.<column>`; of the head without a method, of the mean without a
    split. `protocol2.harmonic` and `protocol2.bound` are those of the whole set and of exact masks. The same call goes
    on where it was stopped.
    """
    plan, network, side = study.plan, study.network, max(lab.base.image_size)
    names = names_of(next(iter(plan.splits.values())))
    test = Known(study.test, names, limit=plan.limit)

    def iou(what: Any, sets: Callable[[], Sequence[Labelled]]) -> Figures:
        """What a network reaches that has learnt from these; found, or trained and tested now."""
        config = dict(base=lab.base.digest, network=asdict(network), names=names, trained_on=what)
        folder = lab.out / "networks" / key_of(config)

        def run() -> Figures:
            draw = drawer(sets())
            learnt = train_network(network.source, network.stage, names, side, folder, draw, lab.device, lab.say)
            return iou_by_name(learnt, test, names)

        return lab.measured({**config, "tested_on": [study.test.about, len(test)]}, run)

    @cache  # of all splits the same, and scenes take their time to draw
    def on_exact() -> Figures:
        exact = study.exact()
        return iou(exact.about, lambda: [Known(exact, names, lab.base.image_size)])

    def on_generated(method: str, kind: str, split: Split) -> Figures:
        paths = folders(lab, plan, kind)
        by = masker(lab, study, method, split, paths)
        return iou([[f.name for f in paths], by.key], lambda: [masked(lab, f, by, names) for f in paths])

    figures: Figures = {"about.protocol2": described(lab, study, len(test))}
    for method in plan.methods:
        if method == "exact" and study.exact is None:
            lab.say("no annotated images to train on, so there is no bound")
            continue
        for kind in study.kinds if method == "head" else study.kinds[-1:]:
            tables = []
            for label, split in plan.splits.items():
                tables.append(grouped(on_exact() if method == "exact" else on_generated(method, kind, split), split))
                lab.say(f"{method}, {kind}, {label}: {', '.join(f'{k} {v}' for k, v in tables[-1].items())}")
                prefix = "protocol2." if method == "head" else f"protocol2.{method}."
                figures |= {f"{prefix}{label}.{kind}.{column}": value for column, value in tables[-1].items()}
            figures |= {f"{prefix}{kind}.{column}": value for column, value in average(tables).items()}
            for place, short in ((f"protocol2.{study.kinds[-1]}", "harmonic"), (f"protocol2.exact.{kind}", "bound")):
                if (value := figures.get(f"{place}.harmonic")) is not None:
                    figures[f"protocol2.{short}"] = value
            lab.publish(figures)
    return figures


def described(lab: Lab, study: Study, tested_on: int) -> str:
    """What was run, in words."""
    plan, network = study.plan, study.network
    whole = next(iter(plan.splits.values()))
    singles, doubles = plan.size.per_name * len(names_of(whole)), plan.size.per_pair * len(whole.pairs)
    what = Path(network.source).name if network.source else "a small UPerNet from scratch"
    options = lab.options
    return (
        f"{Path(lab.source).name}; {singles:,} images of one object and {doubles:,} of two, by {options.sampler} in "
        f"{options.steps} steps at guidance {options.guidance_scale:g}; {what}, {network.iterations:,} steps of "
        f"{network.batch}; tested on {tested_on:,} images with known masks."
    )
