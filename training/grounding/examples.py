"""Algorithm 1 of the paper: images from a model by the engine, masks from a detector.

Images and latents are a run of the engine like any other, so shards, resuming, several machines and Ray are its own.
Masks follow shard by shard, each with a record of its own; whatever is damaged or missing is made again, to the same
bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.engine.dataset.shards import DamagedShard, finished_shards, read_shard
from grounded_diffusion.engine.dataset.storage.base import Storage, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.make import make_dataset
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.base import Detector
from grounded_diffusion.training.detectors.open import open_segmenter
from grounded_diffusion.training.grounding.prompts import TEMPLATES, draw_prompts
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.grounding.store import (
    ABOUT,
    MASKS,
    About,
    damaged_file,
    encode_masks,
    masks_path,
    read_image,
    read_masks_record,
    yields,
)

STEPS, SAMPLER, GUIDANCE = 50, "ddim", 5.0  # the released program's, in training
LOOK = 1.0  # seconds from one look at a shard whose masks another process makes to the next
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExamplesJob:
    """What to make, and where to.

    Attributes:
        model: bundle of the model, such as gd-export --head untrained makes it.
        detector: see detectors.open.
        split: names and pairs.
        out: folder to write.
        examples: images.
        test: draw unseen names and pairs with them too, for validation; else seen ones alone.
        pair_share: share of the images with two names.
        templates: for one name and for two.
        score, instances, aliases: see detectors.base.Detector.
        device: where the detector runs.
        detector_batch: images to one call of the detector.
        options: of the images.
        run: more fields of RunConfig: backend, threads, lanes, shard_size, shard, ray, workers.
    """

    model: Path
    detector: str
    split: Split
    out: Path
    examples: int = 40_000
    test: bool = False
    pair_share: float = 0.5
    templates: tuple[Sequence[str], Sequence[str]] = TEMPLATES
    score: float = 0.5
    instances: str = "all"
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"
    detector_batch: int = 8
    options: Options = field(
        default_factory=lambda: Options(
            sampler=SAMPLER, steps=STEPS, guidance_scale=GUIDANCE, guidance_interval=(0.0, 0.6)
        )
    )
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that are drawn."""
        return (*self.split.seen, *self.split.unseen) if self.test else self.split.seen


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of each name, see store.yields, and what an image cost: seconds for it and for its masks; None where
    there was nothing left to make.
    """

    names: dict[str, dict[str, int]]
    seconds: float | None


def make_examples(job: ExamplesJob, say: Say) -> Outcome:
    """Make the examples, or what is missing of them.

    Raises:
        UsageError: the detector lacks a name, or `job.out` has other examples.
        BundleError, CheckpointError: the model or the detector cannot be used.
        StorageError, DiskFullError: the output cannot be written; the same call goes on once it can.
    """
    manifest = open_bundle(job.model).manifest
    if not manifest.base:
        raise UsageError(f"{job.model} does not say which base model it was made from; export it again with gd-export")
    options = dict(score=job.score, instances=job.instances, aliases=job.aliases)
    detector = Detector(open_segmenter(job.detector, job.device), job.names, **options)
    storage = open_storage(str(job.out))
    check_detector(storage, detector)
    pairs = job.split.pairs if job.test else job.split.seen_pairs
    prompts = draw_prompts(
        job.names, pairs, job.examples, pair_share=job.pair_share, templates=job.templates, seed=job.options.seed
    )
    config = RunConfig(
        out=job.out, prompts=prompts, model=job.model, options=job.options, format="examples", **job.run
    )  # fmt: skip
    mend(storage, say)
    before, began = set(finished_shards(storage)), time.monotonic()
    made = make_dataset(config)
    images = Cost(time.monotonic() - began, count_rows(storage, set(finished_shards(storage)) - before))
    say(f"{images.count} images, {images.spent:.1f} s")
    began = time.monotonic()
    count = make_masks(storage, detector, job.detector_batch, say)
    masks = Cost(time.monotonic() - began, count)
    say(f"masks of {masks.count} images, {masks.spent:.1f} s")
    if made.finished:
        source = dict(
            model=Path(job.model).name, examples=made.accepted, sampler=job.options.sampler, steps=job.options.steps,
            guidance_scale=job.options.guidance_scale, seed=job.options.seed,
        )  # fmt: skip
        about = About(
            manifest.base, manifest.capture_timestep, manifest.query_template, job.split.seen, job.split.unseen, source
        )
        storage.put(ABOUT, about.encode())
    each = [cost.spent / cost.count for cost in (images, masks) if cost.count]
    return Outcome(yields(storage, finished_shards(storage)), sum(each) if each else None)


class Cost(NamedTuple):
    """Seconds spent on some images."""

    spent: float
    count: int


def count_rows(storage: Storage, shards: Iterable[int]) -> int:
    """Images of some finished shards."""
    return sum(len(read_shard(storage, shard)["rows"]) for shard in shards)


def check_detector(storage: Storage, detector: Detector) -> None:
    """Raise UsageError where there are masks of another detector."""
    for name in storage.list(MASKS):
        stem, _, suffix = name.partition(".")
        if suffix == "json" and stem.isdecimal() and (record := read_masks_record(storage, int(stem))):
            before = record["detector"]
            if changed := [key for key, value in same(detector.about).items() if before.get(key) != value]:
                raise UsageError(
                    f"{storage.root} has masks of another detector ({', '.join(changed)} differ); remove "
                    f"{storage.root}/{MASKS} to have them made anew, or choose another --out"
                )
            return


def same(about: dict[str, Any]) -> dict[str, Any]:
    """As it is read back from JSON."""
    return json.loads(json.dumps(about))


def mend(storage: Storage, say: Say) -> None:
    """Remove the records of shards whose files are damaged, so that they are made again."""
    for shard in finished_shards(storage):
        try:
            bad = damaged_file(storage, read_shard(storage, shard)["files"])
        except DamagedShard:
            continue  # the run says so, and makes it again
        if bad:
            say(f"{storage.root}/{bad} is damaged; the shard is made again")
            storage.remove(record_path(shard))


def make_masks(storage: Storage, detector: Detector, batch: int, say: Say) -> int:
    """Make the masks of all shards that have none. Several processes may, each its own shards. Returns the images."""
    count, left = 0, finished_shards(storage)
    while left:
        held = []
        for shard in left:
            with storage.claim(shard) as mine:
                if not mine:
                    held.append(shard)
                elif not has_masks(storage, shard):
                    count += detect_shard(storage, shard, detector, batch)
                    say(f"masks of shard {shard + 1}")
        if left := held:
            time.sleep(LOOK)
    return count


def has_masks(storage: Storage, shard: int) -> bool:
    """Whether the masks of a shard are there, whole, and of as many examples as it has."""
    record = read_masks_record(storage, shard)
    rows = read_shard(storage, shard)["rows"]
    if record is None or [len(areas) for areas in record["areas"]] != [len(row["objects"]) for row in rows]:
        return False
    return damaged_file(storage, {masks_path(shard): record["sha256"]}) is None


def detect_shard(storage: Storage, shard: int, detector: Detector, batch: int) -> int:
    """Detect the objects of a shard's images, and write their masks, the record last."""
    rows = read_shard(storage, shard)["rows"]
    masks, scores = [], []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        images = np.stack([read_image(storage, row) for row in part])
        for found in detector.detect(images, [[thing["name"] for thing in row["objects"]] for row in part]):
            masks.append(found.masks)
            scores.append(found.scores)
    content, record = encode_masks(shard, masks, scores, same(detector.about))
    storage.put(masks_path(shard), content)
    storage.put(masks_path(shard, "json"), record)
    return len(rows)


def table(outcome: Outcome) -> str:
    """What came of each name, for a terminal; `s/mask` is what a found one has cost, images without it included."""
    width = max(map(len, outcome.names), default=0)
    cost = lambda c: f"{outcome.seconds * c['images'] / c['found']:8.2f}" if outcome.seconds and c["found"] else " " * 8
    lines = [f"{'':{width}}  images   found    zero   s/mask"]
    lines += [
        f"{name:{width}}  {c['images']:6}  {c['found']:6}  {c['zero']:6} {cost(c)}".rstrip()
        for name, c in outcome.names.items()
    ]
    return "\n".join(lines)
