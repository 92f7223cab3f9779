"""The worlds a model can be trained on, by the name that a configuration's [world] table gives as `kind`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.emoji import world as emoji
from grounded_diffusion.training.things import world as things
from grounded_diffusion.training.things.meanings import read_meanings

WorldConfig = emoji.WorldConfig | things.ThingsConfig
World = emoji.World | things.ThingsWorld


@dataclass(frozen=True, slots=True)
class Kind:
    """What a configuration needs to know of a world.

    Attributes:
        picture: what shows a name.
        config: the type of its [world] table.
        world: the type of its renderer.
        names: all it can draw.
        unseen: names kept from the head's training by default.
        words: of its captions, names among them; the tokenizer knows each of them whole.
        meanings: reads word -> vector, where the world knows what its words mean.
    """

    picture: str
    config: type
    world: type
    names: tuple[str, ...]
    unseen: tuple[str, ...]
    words: tuple[str, ...]
    meanings: Callable[[], dict[str, torch.Tensor]] | None = None


KINDS = {
    "emoji": Kind(
        "glyph",
        emoji.WorldConfig,
        emoji.World,
        tuple(emoji.NAMES),
        emoji.UNSEEN,
        (*emoji.NAMES, *emoji.COLOURS, *(kind for _, kind in emoji.NAMES.values())),
    ),
    "things": Kind(
        "sprite",
        things.ThingsConfig,
        things.ThingsWorld,
        tuple(things.NAMES),
        things.UNSEEN,
        (*things.NAMES, *things.SURFACES, *things.NAMES.values()),
        read_meanings,
    ),
}


def kind_named(name: str) -> Kind:
    """Raises UsageError for a world there is not."""
    if name not in KINDS:
        raise UsageError(f"world.kind is {name!r}; known: {', '.join(KINDS)}")
    return KINDS[name]


def kind_of(config: WorldConfig) -> Kind:
    """The kind of world a configuration describes."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))


def open_world(config: WorldConfig, names: list[str] | None = None, device: str = "cpu") -> World:
    """The renderer of a world, for these names or for all of its own."""
    return kind_of(config).world(config, names, device)
