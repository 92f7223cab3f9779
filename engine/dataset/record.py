"""A sample as the data set formats take it: values at hand, arrays when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from grounded_diffusion.engine.sampling.sample import ObjectMask, Sample

SPLITS = ("train", "val")
DECIMALS = 4  # of a score in a data set


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An image with its objects. Arrays are read anew each time, so that a data set never fills the memory.

    Attributes:
        index: position in the run; `id` is the same as text, and stem of the sample's files.
        split: "train" or "val".
        objects: with scores, and presence where it is told, of four decimals.
        read_image, read_labels: load uint8 [H,W,3], and uint8 [H,W] with 0 background, k where the object of label k
            lies on top, and 255 where the run has marked pixels as void.
        mask_logits: float32 [O,h',w'] before upsampling, by object; None for a record that was read from files.
        captured_latents: float32 [4,h,w], what the network was given at that step; None likewise.
    """

    index: int
    split: str
    prompt: str
    seed: int
    draw: int
    width: int
    height: int
    capture_timestep: float
    objects: tuple[ObjectMask, ...]
    read_image: Callable[[], np.ndarray]
    read_labels: Callable[[], np.ndarray]
    mask_logits: np.ndarray | None = None
    captured_latents: np.ndarray | None = None

    @property
    def id(self) -> str:
        return sample_id(self.index)

    @property
    def image(self) -> np.ndarray:
        return self.read_image()

    @property
    def labels(self) -> np.ndarray:
        return self.read_labels()

    @classmethod
    def from_sample(cls, sample: Sample, split: str = SPLITS[0]) -> Record:
        """A sample of the pipeline as a record."""
        height, width = sample.labels.shape
        objects = tuple(map(rounded, sample.objects))
        return cls(
            sample.index, split, sample.prompt, sample.seed, sample.draw, width, height, sample.capture_timestep,
            objects, lambda: sample.image, lambda: sample.labels, sample.mask_logits,
            sample.captured_latents,
        )  # fmt: skip


def rounded(found: ObjectMask) -> ObjectMask:
    """An object with the decimals that a data set keeps."""
    presence = None if found.presence is None else round(found.presence, DECIMALS)
    return replace(found, score=round(found.score, DECIMALS), presence=presence)


def told(found: ObjectMask) -> dict[str, float]:
    """An object's score as a row has it, and its presence where the model tells it."""
    return {"score": found.score} if found.presence is None else {"score": found.score, "presence": found.presence}


def sample_id(index: int) -> str:
    """The id of a sample: six digits, more from the millionth on."""
    return f"{index:06d}"


def subfolder(index: int) -> str:
    """A thousand samples share a folder, so that no folder grows with the data set: 3072 -> "003"."""
    return f"{index // 1000:03d}"
