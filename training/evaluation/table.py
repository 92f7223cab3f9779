"""Table 1: methods beside each other, over splits, on the oracle track and the exact track; flat figures by name.

pascal.oracle.one_seen          the trained head, mean over the splits
pascal.split2.exact.two_unseen  the same of one split
daam.pascal.oracle.one_unseen   another method: daam, daam_best, attention, second, paper_form
pascal.oracle.found             of the images themselves
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from grounded_diffusion.training.evaluation.daam import TAU, TAUS, Daam
from grounded_diffusion.training.evaluation.heads import Recipe, describe, train_head, train_presence
from grounded_diffusion.training.evaluation.images import TestImages
from grounded_diffusion.training.evaluation.lab import Figures, Lab, key_of
from grounded_diffusion.training.evaluation.methods import DetectorMethod, HeadMethod, Method, attention_method
from grounded_diffusion.training.evaluation.paper import METHODS
from grounded_diffusion.training.evaluation.protocol1 import (
    CALL,
    Measured,
    TestSize,
    average,
    ceiling,
    make_exact_images,
    make_oracle_images,
    measure,
)
from grounded_diffusion.training.evaluation.report.pictures import write_page
from grounded_diffusion.training.fingerprint import weights_digest
from grounded_diffusion.training.grounding.annotations import Annotations
from grounded_diffusion.training.grounding.config import HeadTraining
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.presence import Presence


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A head that was trained elsewhere, and the names that it was trained on ("seen") and kept from ("unseen").

    `presence` is what came with it; None calibrates it here.
    """

    head: GroundingHead
    names: Mapping[str, Sequence[str]]
    presence: Presence | None = None

    def fits(self, split: Split) -> bool:
        """Whether it was kept from exactly the unseen names of a split."""
        names = {*split.seen, *split.unseen}
        seen, unseen = (set(self.names.get(key, ())) & names for key in ("seen", "unseen"))
        return seen == set(split.seen) and unseen == set(split.unseen)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and on what.

    Attributes:
        name: of the vocabulary, for the figures: pascal, coco, things, ...
        splits: by name; the first decides the vocabulary.
        methods: of METHODS.
        size: of the test images.
        training, examples: of the heads that are trained here.
        trained: each taken for the split whose unseen names it was kept from; for other splits heads are trained here.
        annotations: gives the images of the exact track; None for no such track.
        limit: of annotated images; None for all.
    """

    name: str
    splits: dict[str, Split]
    size: TestSize
    training: HeadTraining
    examples: int
    methods: tuple[str, ...] = METHODS
    trained: tuple[Trained, ...] = ()
    annotations: Callable[[], Annotations] | None = None
    limit: int | None = None

    def trained_for(self, split: Split) -> Trained | None:
        """The head that was kept from a split's unseen names, if there is one."""
        return next((one for one in self.trained if one.fits(split)), None)


@dataclass(slots=True)
class Entry:
    """A method of a split that can be measured: what it is found again by, and how it is opened."""

    key: Any
    open: Callable[[], Method]


@dataclass(slots=True)
class Bench:
    """The images and the methods of a plan."""

    lab: Lab
    plan: Plan
    tracks: list[TestImages]
    figures: Figures = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """All names."""
        split = next(iter(self.plan.splits.values()))
        return (*split.seen, *split.unseen)

    def entry(self, method: str, split: Split) -> Entry:
        """A head, trained or not, of a split; or the second detector, whatever the split."""
        lab, plan = self.lab, self.plan
        if method == "second":
            second = lab.detector(cast(str, lab.detectors.second), tuple(sorted(self.words)))
            return Entry(["second", lab.base.digest, second.about], lambda: DetectorMethod(lab.base, second))
        if method == "attention":
            names = {"all": list(self.words)}
            return Entry(["attention", lab.base.digest, names], lambda: attention_method(lab.base, names))
        if method == "head" and (trained := plan.trained_for(split)):
            head = trained.head.to(lab.base.device)
            return Entry(["head", weights_digest(head), list(split.seen)], lambda: HeadMethod(lab.base, head))
        if method == "presence":
            return self.with_presence(split)
        form = {"variant": "paper"} if method == "paper_form" else {}
        recipe = Recipe(split, replace(plan.training, head={**plan.training.head, **form}), plan.examples)
        return Entry(["head", describe(lab, recipe)], lambda: HeadMethod(lab.base, train_head(lab, recipe)))

    def with_presence(self, split: Split) -> Entry:
        """The head of a split with what came with it, or else calibrated on images that such a head is trained on."""
        lab, recipe, plain = self.lab, Recipe(split, self.plan.training, self.plan.examples), self.entry("head", split)
        trained = self.plan.trained_for(split)
        if trained is not None and trained.presence is not None:
            own = trained.presence.to(lab.base.device)
            return Entry(
                ["presence", plain.key, weights_digest(own)],
                lambda: HeadMethod(lab.base, plain.open().head, presence=own),
            )

        def opened() -> Method:
            head = plain.open().head
            return HeadMethod(lab.base, head, presence=train_presence(lab, recipe, head))

        return Entry(["presence", plain.key, describe(lab, recipe)], opened)

    def measured(self, entry: Entry, images: TestImages, split: Split) -> Measured:
        """What a method reaches on some images; found, or measured now."""
        config = dict(
            method=entry.key, split=[split.seen, split.unseen], images=images.examples.folder.name,
            kept=key_of(images.kept), absent=self.words,
        )  # fmt: skip
        found = self.lab.measured(config, lambda: asdict(measure(entry.open(), images, split, self.words)))
        return Measured(found["figures"], found["by_name"], [tuple(score) for score in found["scores"]])

    def add(self, prefix: str, label: str, images: TestImages, found: Measured, by_name: bool = False) -> None:
        """Put a split's figures among the others."""
        place = f"{prefix}{self.plan.name}.{label}.{images.track}"
        self.figures |= {f"{place}.{name}": value for name, value in found.figures.items()}
        if by_name:
            self.figures |= {f"{place}.name.{name}": value for name, value in found.by_name.items()}

    def mean(self, prefix: str, images: TestImages, tables: Sequence[Measured]) -> None:
        """The mean over the splits."""
        place = f"{prefix}{self.plan.name}.{images.track}"
        self.figures |= {f"{place}.{name}": value for name, value in average([t.figures for t in tables]).items()}


def run_table(lab: Lab, plan: Plan) -> Figures:
    """All figures of a plan. The same call goes on where it was stopped."""
    whole = next(iter(plan.splits.values()))
    tracks = [make_oracle_images(lab, whole, plan.size)]
    if plan.annotations is not None:
        tracks.append(make_exact_images(lab, plan.annotations(), (*whole.seen, *whole.unseen), plan.limit))
    bench = Bench(lab, plan, tracks)
    for images in tracks:
        place = f"{plan.name}.{images.track}"
        bench.figures |= {f"{place}.{name}": value for name, value in images.figures.items()}
        bench.figures |= described(lab, plan, whole)
        best = lab.measured(["ceiling", images.examples.folder.name, key_of(images.kept)], lambda i=images: ceiling(i))
        bench.figures[f"{place}.ceiling"] = best
    for method in plan.methods:
        if method == "second" and lab.detectors.second is None:
            continue
        compare_daam(bench) if method == "daam" else compare(bench, method)
        lab.publish(bench.figures)
    return bench.figures


def described(lab: Lab, plan: Plan, split: Split) -> Figures:
    """What was run, in words."""
    options, size, training = lab.options, plan.size, plan.training
    judge = lab.detector(lab.detectors.judge, tuple(sorted((*split.seen, *split.unseen)))).about
    told = (
        f"{Path(lab.source).name}, {len((*split.seen, *split.unseen))} names; {size.per_name} images of each and "
        f"{size.per_pair} of each of {len(split.pairs)} pairs, by {options.sampler} in {options.steps} steps at "
        f"guidance {options.guidance_scale:g}; judged by {judge['detector']} (weights {judge['weights'][:12]})"
    )
    if lab.detectors.second:
        told += f" and a second detector, at an IoU of at least {size.agreement:g}"
    if not all(map(plan.trained_for, plan.splits.values())):
        told += f"; heads of {training.iterations} steps of {training.batch}, on {plan.examples:,} images"
    return {f"about.{plan.name}": f"{told}.", f"about.{plan.name}.unseen": ", ".join(split.unseen)}


def compare(bench: Bench, method: str) -> None:
    """One method over all splits and tracks."""
    prefix = "" if method == "head" else f"{method}."
    for images in bench.tracks:
        tables = []
        for label, split in bench.plan.splits.items():
            entry = bench.entry(method, split)
            tables.append(bench.measured(entry, images, split))
            bench.add(prefix, label, images, tables[-1], by_name=method == "head")
            bench.lab.say(f"{method}, {label}, {images.track}: {line(tables[-1].figures)}")
            if method == "head" and label == next(iter(bench.plan.splits)):
                file = bench.lab.out / "pages" / f"{bench.plan.name}-{images.track}.webp"
                write_page(file, images, tables[-1].scores, entry.open)
        bench.mean(prefix, images, tables)


def compare_daam(bench: Bench) -> None:
    """DAAM at its own threshold, and at the one that is best on each split's seen names."""
    lab, images, plan = bench.lab, bench.tracks[0], bench.plan
    name = key_of([images.examples.folder.name, images.kept])
    daam: list[Daam] = []  # opened where something is not measured yet

    def at(tau: float) -> Method:
        if not daam:
            daam.append(Daam(lab.base, images, lab.options, lab.out / "daam" / f"{name}.npz", CALL, lab.say))
        return daam[0].at(tau)

    tables: dict[str, list[Measured]] = {"daam.": [], "daam_best.": []}
    for label, split in plan.splits.items():
        found = {tau: bench.measured(Entry(["daam", tau], lambda t=tau: at(t)), images, split) for tau in (TAU, *TAUS)}
        best = max(TAUS, key=lambda tau: seen_score(found[tau].figures))
        bench.figures[f"daam_best.{plan.name}.{label}.oracle.tau"] = best
        for prefix, tau in (("daam.", TAU), ("daam_best.", best)):
            bench.add(prefix, label, images, found[tau])
            tables[prefix].append(found[tau])
            lab.say(f"DAAM at {tau}, {label}: {line(found[tau].figures)}")
    for prefix, rows in tables.items():
        bench.mean(prefix, images, rows)


def seen_score(figures: Figures) -> float:
    """What a threshold is chosen by: seen names alone."""
    return sum(figures.get(group, 0.0) for group in ("one_seen", "two_seen"))


def line(figures: Figures) -> str:
    """A table's row in words."""
    shown = [f"{name} {value}" for name, value in figures.items() if not name.endswith(("per_mask", "images"))]
    return ", ".join(shown) or "no image counts"
