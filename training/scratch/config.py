"""Configuration of a training run: one TOML file, one table a stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from grounded_diffusion.engine.checks import first_line
from grounded_diffusion.errors import GroundedDiffusionError, UsageError
from grounded_diffusion.reading import Misfit, as_type, line_of, load_toml, read_file
from grounded_diffusion.training.loop import StageConfig
from grounded_diffusion.training.things.world import NAMES, UNSEEN, WorldConfig

T = TypeVar("T")
STAGES = ("vae", "unet", "oracle", "labeller", "judge", "head")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run: the world, the sizes of the models, and each stage's pace.

    Attributes:
        world: how scenes are drawn.
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
        stages: pace of the stages "vae", "unet", "oracle", "labeller", "judge" and "head".
    """

    world: WorldConfig = field(default_factory=WorldConfig)
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
        object.__setattr__(self, "names", self.names or tuple(NAMES))
        object.__setattr__(self, "unseen", UNSEEN if self.unseen is None else self.unseen)
        if missing := [name for name in (*self.names, *self.unseen) if name not in NAMES]:
            raise UsageError(f"no sprite is known for {', '.join(missing)}; known names: {', '.join(NAMES)}")
        if unknown := sorted(self.init.keys() - {"vae", "unet"}):
            raise UsageError(f"unknown part {', '.join(unknown)} in [init]; known: vae, unet")
        for part, folder in self.init.items():
            if not Path(folder, part).is_dir():
                raise UsageError(f"init.{part} is {folder}, which holds no {part}; name a checkpoint directory")
        for name in ("latents", "examples"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.rendered_share <= 1:
            raise UsageError(f"rendered_share is {self.rendered_share}; it must lie in [0, 1]")
        if not 0 <= self.absent_weight < math.inf or not 1 <= self.capture_range < 1000:
            raise UsageError("absent_weight must be at least 0 and capture_range from 1 to 999")

    @property
    def seen(self) -> tuple[str, ...]:
        """Names the head is trained on."""
        return tuple(name for name in self.names if name not in self.unseen)


@contextmanager
def table_errors(table: str) -> Iterator[None]:
    """Turn what a library says of the keyword arguments of a table into one line. Raises UsageError."""
    try:
        yield
    except GroundedDiffusionError:
        raise
    except Exception as error:  # each library has its own kinds
        raise UsageError(f"[{table}] describes nothing that can be built: {first_line(error)}") from None


def _table(kind: type[T], table: Any, where: str, content: bytes) -> T:
    """A table as its dataclass; what is in it already as one stays. Raises Misfit, and UsageError of the dataclass."""
    if not isinstance(table, dict):
        raise Misfit(f"{where} must be a table", line_of(content, where))
    kinds = get_type_hints(kind)
    if unknown := sorted(table.keys() - kinds):
        raise Misfit(f"unknown option {', '.join(unknown)} in [{where}]; known: {', '.join(sorted(kinds))}")
    made = ("world", "stages") if kind is TrainConfig else ()
    name = lambda key: key if kind is TrainConfig else f"{where}.{key}"
    return kind(**{
        key: value if key in made else as_type(value, kinds[key], content, name(key)) for key, value in table.items()
    })  # fmt: skip


def load_config(path: str | Path) -> TrainConfig:
    """Read a TOML file. Raises UsageError with file, line and option: unknown, of another type, or out of range."""
    try:
        content = read_file(path)
        raw = load_toml(content)
        stages = as_type(raw.get("stages", {}), dict[str, Any], content, "stages")
        if unknown := sorted(stages.keys() - set(STAGES)):
            raise Misfit(f"unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
        raw["world"] = _table(WorldConfig, raw.get("world", {}), "world", content)
        raw["stages"] = {name: _table(StageConfig, table, f"stages.{name}", content) for name, table in stages.items()}
        return _table(TrainConfig, raw, str(path), content)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except Misfit as error:
        raise UsageError(error.at(path)) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
