"""How a grounding head is trained: the paper's settings, the released program's, and quicker ones for small models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import as_type, load_toml, read_file, settings_errors
from grounded_diffusion.training.grounding.loss import ZERO_MASKS

OPTIMIZERS = ("adam", "muon")
LOSSES = ("mean", "sum")
PRECISIONS = ("fp32", "bf16", "fp16")
MAX_NOISE = 999


@dataclass(frozen=True, slots=True)
class HeadTraining:
    """Length and pace. The defaults are the paper's (section 4.1).

    Attributes:
        iterations: optimiser steps.
        batch: examples to a step, over all processes.
        lr: learning rate of Adam.
        weight_decay: of Adam.
        optimizer: "adam", or "muon" for matrices and convolutions with Adam for the rest, see training/optim.py.
        muon_lr: learning rate of Muon's share.
        warmup: steps of linear warm-up.
        cooldown: last share of the steps, over which the rate falls linearly to zero; 0 for none.
        zero_masks: "skip" trains without the terms of names that the detector did not find, "trust" with them.
        loss: "mean" over the objects of a batch, or "sum" over an image's objects and the mean over images, as the
            released program has it.
        noise_range: half of the examples are noised up to this timestep, so that the head can be read at other
            samplers' last steps as well; 0 trains at the captured timestep alone.
        clip: largest norm of the gradient; 0 for none.
        precision: "fp32", "bf16" or "fp16" (mixed).
        seed: of initial weights, order and noise.
        validate_every: steps between validations; 0 for none.
        validation: examples to hold back from training for it, and to take of each validation set.
        save_every: steps between resumable states.
        head: keyword arguments of HeadConfig.

    Raises:
        UsageError: a value outside its range.
    """

    iterations: int = 5000
    batch: int = 8
    lr: float = 1e-4
    weight_decay: float = 1e-4
    optimizer: str = "adam"
    muon_lr: float = 0.01
    warmup: int = 0
    cooldown: float = 0.0
    zero_masks: str = "skip"
    loss: str = "mean"
    noise_range: int = 0
    clip: float = 0.0
    precision: str = "fp32"
    seed: int = 0
    validate_every: int = 500
    validation: int = 256
    save_every: int = 250
    head: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("iterations", "batch", "save_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        for name in ("warmup", "validate_every", "validation", "seed"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 0")
        choices = dict(optimizer=OPTIMIZERS, zero_masks=ZERO_MASKS, loss=LOSSES, precision=PRECISIONS)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is unknown; choose {' or '.join(known)}")
        for name in ("lr", "muon_lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be a finite number of at least 0")
        if not (self.lr and self.muon_lr):
            raise UsageError("lr and muon_lr must be above 0")
        if not 0 <= self.cooldown <= 1 or not 0 <= self.noise_range <= MAX_NOISE:
            raise UsageError(f"cooldown must lie in [0, 1] and noise_range in [0, {MAX_NOISE}]")

    def rate(self, step: int) -> float:
        """Share of the full learning rate at a step."""
        down = (self.iterations - step) / (self.cooldown * self.iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / max(1, self.warmup), down)


PRESETS = {
    "paper": HeadTraining(),
    "released": HeadTraining(lr=1e-5, weight_decay=0.0, batch=1, loss="sum", zero_masks="trust"),
    "quick": HeadTraining(
        iterations=700, batch=32, lr=1e-3, weight_decay=0.0, optimizer="muon", warmup=50, cooldown=0.6,
        noise_range=160, clip=1.0, validate_every=100, save_every=100,
    ),
}  # fmt: skip


def build(
    preset: str, file: Path | None = None, given: dict[str, Any] | None = None, variant: str | None = None
) -> HeadTraining:
    """A preset, changed by a TOML file, changed by what the command line gives. Raises UsageError."""
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}; known are {', '.join(PRESETS)}")
    changes = read_settings(file) if file else {}
    config = replace(PRESETS[preset], **{**changes, **(given or {})})
    return replace(config, head={**config.head, "variant": variant}) if variant else config


def read_settings(file: Path) -> dict[str, Any]:
    """Fields of HeadTraining from a TOML file; unknown ones fail by name. Raises UsageError."""
    with settings_errors(file, "the settings"):
        content = read_file(file)
        settings = load_toml(content)
        known = {field.name for field in fields(HeadTraining)}
        if unknown := sorted(settings.keys() - known):
            raise UsageError(f"unknown settings {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        as_type(settings, HeadTraining, content)
    return settings
