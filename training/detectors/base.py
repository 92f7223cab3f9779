"""What a detector is, and how its findings become one mask a name.

A `Segmenter` is one kind of model: it finds instances of its own labels. `Detector` puts names on top: it knows which
labels stand for a name, leaves out what is not sure enough, and joins the instances of a name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.labels import match_labels

INSTANCES = ("all", "first")


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """One finding.

    Attributes:
        label: id among the segmenter's labels.
        score: how sure, from 0 to 1.
        mask: bool [H,W].
    """

    label: int
    score: float
    mask: np.ndarray


class Segmenter(Protocol):
    """One kind of segmentation model.

    Attributes:
        labels: what it knows, by id.
        about: what it is, JSON-ready; two with the same entry give the same findings.
    """

    labels: Mapping[int, str]
    about: dict[str, Any]

    def segment(self, images: np.ndarray, wanted: Sequence[Collection[int]]) -> list[list[Instance]]:
        """Findings of each image, the surest first.

        Args:
            images: uint8 [B,H,W,3].
            wanted: the labels that count, for each image; others are not returned.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """What was found of the O names of an image.

    Attributes:
        masks: bool [O,H,W]; all False where a name was not found.
        scores: float32 [O], of the surest instance; 0 where a name was not found.
    """

    masks: np.ndarray
    scores: np.ndarray


class Detector:
    """Finds names in images.

    Args:
        segmenter: finds instances of its labels.
        names: all names that will be asked for.
        score: instances of a lower score are left out.
        instances: "all" joins the instances of a name, as the paper does; "first" takes the surest alone, as the
            released program does.
        aliases: name -> labels, for names that the segmenter's labels say in words of their own.

    Attributes:
        labels: name -> ids of its labels.
        about: what decides a detection, JSON-ready.

    Raises:
        UsageError: a name that no label stands for, with the nearest labels; a value outside its range.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        names: Sequence[str],
        *,
        score: float = 0.5,
        instances: str = "all",
        aliases: Mapping[str, Sequence[str]] | None = None,
    ):
        if not 0 <= score <= 1:
            raise UsageError(f"the least score of an instance is {score}; it must lie in [0, 1]")
        if instances not in INSTANCES:
            raise UsageError(f"instances {instances!r} are unknown; choose {' or '.join(INSTANCES)}")
        self.segmenter, self.score, self.instances = segmenter, score, instances
        self.labels = match_labels(names, segmenter.labels, aliases or {})
        shown = {name: [segmenter.labels[k] for k in ids] for name, ids in self.labels.items()}
        self.about = {**segmenter.about, "score": score, "instances": instances, "labels": shown}

    def detect(self, images: np.ndarray, names: Sequence[Sequence[str]]) -> list[Detection]:
        """Masks and scores of the names of each image; images are uint8 [B,H,W,3]."""
        wanted = [{k for name in row for k in self.labels[name]} for row in names]
        found = self.segmenter.segment(images, wanted)
        return [self._join(image.shape[:2], row, here) for image, row, here in zip(images, names, found, strict=True)]

    def _join(self, size: tuple[int, int], names: Sequence[str], found: list[Instance]) -> Detection:
        masks, scores = np.zeros((len(names), *size), np.bool_), np.zeros(len(names), np.float32)
        for o, name in enumerate(names):
            good = [one for one in found if one.label in self.labels[name] and one.score >= self.score]
            good.sort(key=lambda one: -one.score)
            for one in good[:1] if self.instances == "first" else good:
                masks[o] |= one.mask
            if masks[o].any():
                scores[o] = good[0].score
        return Detection(masks, scores)
