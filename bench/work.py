"""What a bench gives a system to do, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from grounded_diffusion.engine import Prompt

OBJECTS = 2  # to a prompt
EVERY_STEP = (0.0, 1.0)  # guidance_interval of plain classifier-free guidance


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One round: n prompts of OBJECTS objects each, and noise [n,4,h,w] to start from."""

    prompts: tuple[Prompt, ...]
    noise: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """images uint8 [n,H,W,3], masks bool [n,O,H,W]."""

    images: np.ndarray
    masks: np.ndarray


class System(Protocol):
    """One way of making images with masks."""

    name: str

    def run(self, work: Work) -> Output:
        """All images of a round with the masks of their objects."""
        ...
