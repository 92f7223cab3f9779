"""How to generate: the options of a run, checked when they are made; what they leave open is the model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from grounded_diffusion.bundle import Manifest
from grounded_diffusion.engine.checks import check_float, check_int
from grounded_diffusion.engine.sampling.noise import MAX_SEED
from grounded_diffusion.engine.sampling.schedule import SAMPLERS
from grounded_diffusion.errors import UsageError

MAX_BATCH = 256
# Of a bundle that does not say its own: fast ones, whose price docs/benchmarks.md states.
SAMPLING: dict[str, Any] = {"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 7.5, "guidance_interval": (0.0, 0.6)}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one run. None is the model's own value, which `of_model` fills in.

    Attributes:
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; 1 turns it off, and so does 0, as cards of
            few-step models have it.
        guidance_interval: (start, end) of the guided part of the way from noise (0) to image (1); outside, only the
            conditional half of the network runs (Kynkaanniemi et al. 2024).
        sampler: one of schedule.SAMPLERS.
        seed: seed of the data set; the same seed and sample index give the same image at any batch size.
        images_per_prompt: images of each prompt that does not say its own count.
        batch: images to one call of the network; None is what the backend is best at.
        threshold: a pixel is inside a mask where its probability is above this.
        size: (height, width) in pixels, or one number for both; None takes the model's own.
        negative_prompt: what not to draw, for prompts that do not say it themselves.

    Raises:
        UsageError: an option outside its range, at construction.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    seed: int = 7
    images_per_prompt: int = 1
    batch: int | None = None
    threshold: float = 0.5
    size: tuple[int, int] | int | None = None
    negative_prompt: str | None = None

    def __post_init__(self):
        self._check_sampling()
        check_int(self.seed, "seed", 0, MAX_SEED)
        check_int(self.images_per_prompt, "images_per_prompt", 1, 1_000_000)
        if self.batch is not None:
            check_int(self.batch, "batch", 1, MAX_BATCH)
        check_float(self.threshold, "threshold", 0.001, 0.999)
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise UsageError(f"negative_prompt must be a text, not {self.negative_prompt!r}")
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        if self.size is not None:
            if not isinstance(self.size, tuple | list) or len(self.size) != 2:
                raise UsageError(f"size must be (height, width) in pixels, not {self.size!r}")
            for value in self.size:
                check_int(value, "size", 1, 8192)
            object.__setattr__(self, "size", tuple(self.size))

    def _check_sampling(self) -> None:
        """Raise UsageError for one of the fields that a model may say itself."""
        if self.steps is not None:
            check_int(self.steps, "steps", 1, 1000)
        if self.guidance_scale == 0:
            object.__setattr__(self, "guidance_scale", 1.0)
        if self.guidance_scale is not None:
            check_float(self.guidance_scale, "guidance_scale", 1.0, 100.0)
        if (interval := self.guidance_interval) is not None:
            if not isinstance(interval, tuple | list) or len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
                line = f"guidance_interval must be (start, end) with 0 <= start <= end <= 1, not {interval!r}"
                raise UsageError(line)
            object.__setattr__(self, "guidance_interval", tuple(map(float, interval)))
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UsageError(f"unknown sampler {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")

    def of_model(self, manifest: Manifest) -> Options:
        """The same options, what they leave open filled in with the model's own. Raises UsageError for such a value."""
        own = SAMPLING | manifest.sampling
        return replace(self, **{name: own[name] for name in SAMPLING if getattr(self, name) is None})

    def image_size(self, manifest: Manifest) -> tuple[int, int]:
        """(H, W) of the images a model is to make. Raises UsageError where the model cannot."""
        height, width = cast(tuple[int, int], self.size or manifest.image_size)  # a single number is two by now
        multiple = manifest.size_multiple
        for value, side in ((height, "height"), (width, "width")):
            if value % multiple:
                near = [n for n in (value // multiple * multiple, (value // multiple + 1) * multiple) if n]
                raise UsageError(
                    f"{side} {value} is not divisible by {multiple}, as this model needs; "
                    f"use {' or '.join(map(str, near))}"
                )
        return height, width
