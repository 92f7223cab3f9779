"""One image with its masks: what the engine hands out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class ObjectMask:
    """An object of an image, and where it is.

    Attributes:
        name: as the prompt names it; different for every object of an image.
        label: its value in the image's label map, from 1.
        area: pixels of the mask.
        box: x, y, width, height of the mask; zeros when it is empty.
        score: mean probability inside the mask; 0 when it is empty.
        presence: probability that the object is in the image at all; None where the model does not tell.
        read_mask: gives the mask, bool [H,W]: at hand in a Sample, from a file in a data set.
    """

    name: str
    label: int
    area: int
    box: tuple[int, int, int, int]
    score: float
    read_mask: Callable[[], np.ndarray]
    presence: float | None = None

    @property
    def mask(self) -> np.ndarray:
        """bool [H,W]; masks may overlap."""
        return self.read_mask()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image with its masks.

    Attributes:
        index: position in the run, from 0.
        prompt: text of the prompt.
        objects: its objects, in the prompt's order.
        seed, draw: the key of the noise.
        image: uint8 [H,W,3].
        labels: uint8 [H,W]; 0 background, k where object k (from 1) has the highest logit inside its mask.
        capture_timestep: training timestep at which the grounding head read the network.
        mask_logits: float32 [O,h',w'], before upsampling.
        latents: float32 [4,h,w], what the image was decoded from.
        captured_latents: float32 [4,h,w], what the network was given at the captured step.
    """

    index: int
    prompt: str
    objects: tuple[ObjectMask, ...]
    seed: int
    draw: int
    image: np.ndarray
    labels: np.ndarray
    capture_timestep: float
    mask_logits: np.ndarray
    latents: np.ndarray
    captured_latents: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """The objects' names, in the prompt's order."""
        return tuple(found.name for found in self.objects)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """bool [H,W] by the object's name, as in `sample.masks["dog"]`."""
        return {found.name: found.mask for found in self.objects}

    def object(self, name: str) -> ObjectMask:
        """The object of a name. Raises KeyError."""
        for found in self.objects:
            if found.name == name:
                return found
        raise KeyError(name)
