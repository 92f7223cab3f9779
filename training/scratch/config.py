"""Configuration of a training run: one TOML file, one table a stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from grounded_diffusion.engine.checks import first_line
from grounded_diffusion.errors import GroundedDiffusionError, UsageError
from grounded_diffusion.reading import Misfit, as_type, line_of, load_toml, read_file, settings_errors
from grounded_diffusion.training.loop import StageConfig
from grounded_diffusion.training.things.world import NAMES, WorldConfig

T = TypeVar("T")
STAGES = ("vae", "unet", "labeller", "judge")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole run: the world, the sizes of the models, and each stage's pace.

    Attributes:
        world: how scenes are drawn.
        names: vocabulary of the base model; empty for all of the world's.
        vae, text, unet: keyword arguments of diffusers' AutoencoderKL, transformers' CLIPTextConfig and
            diffusers' UNet2DConditionModel.
        scheduler: keyword arguments of diffusers' DDIMScheduler.
        init: checkpoint directories whose weights training starts from: "vae" for the autoencoder, "unet" for UNet and
            text encoder. Without one a part starts from scratch; an autoencoder without a stage is taken as it is.
        latents: images encoded once and drawn from while the UNet trains.
        stages: pace of the stages "vae", "unet", "labeller" and "judge".
    """

    world: WorldConfig = field(default_factory=WorldConfig)
    names: tuple[str, ...] = ()
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    init: dict[str, str] = field(default_factory=dict)
    latents: int = 100_000
    stages: dict[str, StageConfig] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "names", self.names or tuple(NAMES))
        if missing := [name for name in self.names if name not in NAMES]:
            raise UsageError(f"no sprite is known for {', '.join(missing)}; known names: {', '.join(NAMES)}")
        if unknown := sorted(self.init.keys() - {"vae", "unet"}):
            raise UsageError(f"unknown part {', '.join(unknown)} in [init]; known: vae, unet")
        for part, folder in self.init.items():
            if not Path(folder, part).is_dir():
                raise UsageError(f"init.{part} is {folder}, which holds no {part}; name a checkpoint directory")
        if self.latents < 1:
            raise UsageError(f"latents is {self.latents}; it must be at least 1")


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
    with settings_errors(path, "the configuration"):
        content = read_file(path)
        raw = load_toml(content)
        stages = as_type(raw.get("stages", {}), dict[str, Any], content, "stages")
        if unknown := sorted(stages.keys() - set(STAGES)):
            raise Misfit(f"unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
        raw["world"] = _table(WorldConfig, raw.get("world", {}), "world", content)
        raw["stages"] = {name: _table(StageConfig, table, f"stages.{name}", content) for name, table in stages.items()}
        return _table(TrainConfig, raw, str(path), content)
