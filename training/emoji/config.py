"""Configuration of a training run: one TOML file, one table a stage."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.emoji.world import WorldConfig as EmojiConfig
from grounded_diffusion.training.worlds import WorldConfig, kind_named, kind_of


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Length and pace of one stage.

    Attributes:
        steps: optimiser steps; raise or lower it and run again to go on or to finish sooner.
        batch: images a step.
        lr: learning rate of AdamW's share of the parameters.
        muon_lr: learning rate of Muon's share; 0 trains everything with AdamW.
        warmup: steps of linear warm-up.
        cooldown: last share of the steps, over which the rate falls linearly to zero.
        weight_decay: decoupled decay of matrices.
        ema: decay of the running average of the weights that is kept as the result; 0 keeps none.
        seed: of initial weights, data and noise.
        sample_every: steps between sample grids.
        save_every: steps between resumable states.
        compile: use torch.compile; repays its minutes only in long runs.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.02
    warmup: int = 50
    cooldown: float = 0.5
    weight_decay: float = 0.0
    ema: float = 0.0
    seed: int = 0
    sample_every: int = 500
    save_every: int = 500
    compile: bool = False

    def __post_init__(self):
        for name in ("steps", "batch", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.ema < 1 or not 0 < self.cooldown <= 1:
            raise UsageError("ema must lie in [0, 1) and cooldown in (0, 1]")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, plateau, linear cool-down."""
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / (self.cooldown * self.steps))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run: the world, the sizes of the models, and each stage's pace.

    Attributes:
        world: which world, and how its images are drawn.
        names: vocabulary of the base model; empty for all of the world's.
        unseen: names kept from the head and from the oracle that labels its training images.
        vae, text, unet: keyword arguments of diffusers' AutoencoderKL, transformers' CLIPTextConfig and
            diffusers' UNet2DConditionModel.
        scheduler: keyword arguments of diffusers' DDIMScheduler.
        init: checkpoint directories whose weights training starts from: "vae" for the autoencoder, "unet" for UNet and
            text encoder. Without one a part starts from scratch; an autoencoder without a stage is taken as it is.
        head: keyword arguments of HeadConfig.
        latents: images encoded once and drawn from while the UNet trains.
        examples: generated images on which the head is trained.
        rendered_share: share of the head's batches that are rendered scenes with exact masks.
        absent_weight: weight, in the head's loss, of the empty mask of a name that is not in the image. For a closed
            vocabulary: with the shipped model 0.5 took the mask of an absent name from 23% of the image to 0.4%, and
            the mIoU of unseen names from 86% to 22%.
        capture_range: the head reads half of its examples at timesteps up to this one, so that it can be used with
            samplers that end elsewhere; 1 for the captured timestep alone.
        stages: pace of the stages "vae", "unet", "oracle", "labeller" and "head".
    """

    world: WorldConfig = field(default_factory=EmojiConfig)
    names: tuple[str, ...] = ()
    unseen: tuple[str, ...] | None = None
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    init: dict[str, str] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    latents: int = 100_000
    examples: int = 4096
    rendered_share: float = 0.5
    absent_weight: float = 0.0
    capture_range: int = 1
    stages: dict[str, StageConfig] = field(default_factory=dict)

    def __post_init__(self):
        kind = kind_of(self.world)
        object.__setattr__(self, "names", self.names or kind.names)
        object.__setattr__(self, "unseen", kind.unseen if self.unseen is None else self.unseen)
        if missing := [name for name in (*self.names, *self.unseen) if name not in kind.names]:
            raise UsageError(
                f"no {kind.picture} is known for {', '.join(missing)}; known names: {', '.join(kind.names)}"
            )
        if unknown := sorted(self.init.keys() - {"vae", "unet"}):
            raise UsageError(f"unknown part {', '.join(unknown)} in [init]; known: vae, unet")
        for part, folder in self.init.items():
            if not Path(folder, part).is_dir():
                raise UsageError(f"init.{part} is {folder}, which holds no {part}; name a checkpoint directory")
        if not 0 <= self.rendered_share <= 1:
            raise UsageError(f"rendered_share is {self.rendered_share}; it must lie in [0, 1]")
        if self.absent_weight < 0 or not 1 <= self.capture_range < 1000:
            raise UsageError("absent_weight must be at least 0 and capture_range from 1 to 999")

    @property
    def seen(self) -> tuple[str, ...]:
        """Names the head is trained on."""
        return tuple(name for name in self.names if name not in self.unseen)


def _build(kind, table: dict[str, Any], where: str):
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(table.keys() - known):
        raise UsageError(f"unknown option {', '.join(unknown)} in [{where}]; known: {', '.join(sorted(known))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})


def load_config(path: str | Path) -> TrainConfig:
    """Read a TOML file. Unknown tables and options fail by name."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    world = raw.get("world", {})
    raw["world"] = _build(kind_named(world.pop("kind", "emoji")).config, world, "world")
    raw["stages"] = {k: _build(StageConfig, v, f"stages.{k}") for k, v in raw.get("stages", {}).items()}
    return _build(TrainConfig, raw, str(path))
