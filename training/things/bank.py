"""The checked-in bank: sprites and backgrounds as tensors, with what is known of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

FOLDER = Path(__file__).with_name("bank")


@cache
def read_index() -> dict[str, Any]:
    """What render_bank wrote: size, views, names with their kinds, places and models, surfaces, photographs."""
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def _strip(file: Path, size: int) -> torch.Tensor:
    """The square tiles of a strip as [n,c,size,size] in [0,1]; colours are premultiplied by the opacity."""
    pixels = np.array(Image.open(file), np.float32) / 255
    if pixels.shape[-1] == 4:
        pixels[..., :3] *= pixels[..., 3:]
    tiles = torch.from_numpy(pixels).permute(2, 0, 1).unfold(2, pixels.shape[0], pixels.shape[0])
    return F.interpolate(tiles.permute(2, 0, 1, 3), (size, size), mode="area")


@dataclass(frozen=True, slots=True)
class Sprites:
    """The sprites of a vocabulary, sorted by name.

    Attributes:
        pictures: [N,4,S,S] premultiplied RGBA in [0,1].
        first, count: [names] where a name's sprites begin, and how many it has.
        floor: [N] the lowest drawn row, in half sides below the centre.
    """

    pictures: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    floor: torch.Tensor


def load_sprites(names: list[str], size: int, models: int, views: int, held_out: bool = False) -> Sprites:
    """Sprites of every name.

    Args:
        names: known to the index.
        size: side in pixels.
        models: the first models of a name to take; 0 takes all.
        views: the first views of a model to take; 0 takes all.
        held_out: take the models that are kept from training, where a name has any.
    """
    pictures, count = [], []
    for name in names:
        known = read_index()["names"][name]["models"]
        chosen = [m for m in known if m["held_out"] == held_out] or [m for m in known if not m["held_out"]]
        chosen = chosen[: models or None]
        tiles = torch.cat([_strip(FOLDER / model["file"], size)[: views or None] for model in chosen])
        pictures.append(tiles)
        count.append(len(tiles))
    pictures, count = torch.cat(pictures), torch.tensor(count)
    rows = (pictures[:, 3].amax(2) > 0.5).float() * torch.arange(1, size + 1)
    return Sprites(pictures, count.cumsum(0) - count, count, rows.amax(1) * 2 / size - 1)


def load_backgrounds(size: int) -> tuple[torch.Tensor, list[str]]:
    """Backgrounds [N,3,size,size] in [0,1], as many of each surface, and the surfaces' names."""
    surfaces = read_index()["surfaces"]
    return torch.cat([_strip(FOLDER / "backgrounds" / f"{s}.webp", size) for s in surfaces]), surfaces
