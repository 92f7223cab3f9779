"""The images that are measured on, and what is true of them: the oracle track and the exact track.

Oracle track: images that the model makes, masks of a detector. In the place of the paper's check by hand an image
counts where the detector finds every name that was asked for, and where a second one, if there is one, agrees. Exact
track: images whose masks are known, rendered or annotated, read in the first step of their inversion (C.3).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import replace_file
from grounded_diffusion.training.detectors.base import Detector
from grounded_diffusion.training.evaluation.tally import iou, percent
from grounded_diffusion.training.grounding.store import Example, ExampleSet, read_image

LEAST_AREA = 0.02  # share of the image that a found object covers
CALL = 16  # images to one call of a detector


@dataclass(frozen=True, slots=True, eq=False)
class TestImages:
    """Images with masks that count as true.

    Attributes:
        track: "oracle" or "exact".
        examples: all of them.
        kept: places of those that count.
        figures: how many there are and were kept.
    """

    track: str
    examples: ExampleSet
    kept: tuple[int, ...]
    figures: dict[str, float] = field(default_factory=dict)

    __test__ = False  # not a test, whatever its name says to pytest

    def batches(self, size: int) -> list[list[tuple[int, Example]]]:
        """(place, example) of those that count, images of as many names together."""
        by_count: dict[int, list[int]] = {}
        for k in self.kept:
            by_count.setdefault(len(self.examples.names(k)), []).append(k)
        cuts = [ks[i : i + size] for ks in by_count.values() for i in range(0, len(ks), size)]
        return [[(k, self.examples[k]) for k in cut] for cut in cuts]


def exact_images(folder: Path, names: Sequence[str]) -> TestImages:
    """Examples of gd-train real; those with other names, or more than two, do not count. Raises UsageError."""
    found, known = ExampleSet(folder), set(names)
    kept = [k for k in range(len(found)) if len(found.names(k)) <= 2 and known.issuperset(found.names(k))]
    return TestImages("exact", found, tuple(kept), {"images": len(found), "kept": percent(len(kept) / len(found))})


def oracle_images(folder: Path, second: Detector | None, agreement: float) -> TestImages:
    """Examples of gd-train examples --test, those that the detectors find good.

    Args:
        second: must find every object too, at an IoU of at least `agreement` with the first; None asks nobody.

    Raises:
        UsageError: damaged examples, or none on which the detectors agree.
    """
    found = ExampleSet(folder)
    least = LEAST_AREA * found[0].masks[0].size
    seen = [[area >= least for area in found.areas(k)] for k in range(len(found))]
    kept = [k for k, hits in enumerate(seen) if all(hits)]
    figures = {"images": len(found), **found_figures(found, seen)}
    if second is not None:
        kept = agreed(found, kept, second, agreement, folder)
    if not kept:
        raise UsageError(f"none of the {len(found)} images of {folder} is one in which all that was asked for is found")
    figures["accepted"] = percent(len(kept) / len(found))
    return TestImages("oracle", found, tuple(kept), figures)


def found_figures(found: ExampleSet, seen: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Shares of images in which the detector found what was asked for: of one object, of two, of the worst name."""
    ones: dict[str, list[bool]] = {}
    for k, hits in enumerate(seen):
        if len(hits) == 1:
            ones.setdefault(found.names(k)[0], []).extend(hits)
    both = [all(hits) for hits in seen if len(hits) == 2]
    figures = {}
    if ones:
        figures["found"] = percent(mean(hit for hits in ones.values() for hit in hits))
        figures["found_least"] = percent(min(mean(hits) for hits in ones.values()))
    if both:
        figures["both_found"] = percent(mean(both))
    return figures


def agreed(found: ExampleSet, kept: Sequence[int], second: Detector, agreement: float, folder: Path) -> list[int]:
    """Those of the images in which a second detector finds the same; what it found is kept in `second.json`."""
    storage, file = open_storage(str(folder)), folder.parent / f"{folder.name}-second.json"
    about = json.loads(json.dumps(second.about))
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("detector") != about or known.get("of") != found.detectors:
        values = {}
        for start in range(0, len(kept), CALL):
            part = kept[start : start + CALL]
            images = np.stack([read_image(storage, found.row(k)) for k in part])
            for k, detection in zip(part, second.detect(images, [found.names(k) for k in part]), strict=True):
                pairs = zip(torch.from_numpy(detection.masks), torch.from_numpy(found[k].masks), strict=True)
                values[str(k)] = min(iou(a, b) for a, b in pairs)
        known = {"detector": about, "of": found.detectors, "least_iou": values}
        replace_file(file, json.dumps(known).encode())
    return [k for k in kept if known["least_iou"][str(k)] >= agreement]
