"""Rendered scenes as annotated images, for the exact track: so many of each name and pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.images import to_uint8
from grounded_diffusion.training.things.world import NAMES, World, WorldConfig

BATCH = 128
PATIENCE = 40  # times as many scenes as are wanted are drawn in search of them, at least
LEAST_AREA = 0.02  # share of the image; an object that is hidden by another is no test


class Scenes:
    """See grounding.annotations.Annotations.

    Args:
        names: what is drawn.
        pairs: which are drawn together.
        per_name, per_pair: scenes of each.
        size: side in pixels.
        seed: of the scenes.

    Raises:
        UsageError: the world lacks a name.
    """

    def __init__(
        self, names: Sequence[str], pairs: Sequence[tuple[str, str]], per_name: int, per_pair: int,
        size: int, seed: int = 0,
    ):  # fmt: skip
        if missing := [name for name in names if name not in NAMES]:
            raise UsageError(f"no scene shows {', '.join(missing)}; what can be drawn: {', '.join(NAMES)}")
        self.labels = dict(enumerate(names))
        about = dict(names=list(names), per_name=per_name, per_pair=per_pair, size=size, seed=seed)
        self.about: dict[str, Any] = {"annotations": "rendered scenes", **about}
        wanted = {(name,): per_name for name in names} | {tuple(sorted(pair)): per_pair for pair in pairs}
        self._scenes = draw(World(WorldConfig(size=size), list(names)), wanted, seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def read(self, k: int) -> tuple[Image.Image, dict[int, np.ndarray]]:
        image, masks = self._scenes[k]
        return Image.fromarray(image), masks


def scenes_of(names: Sequence[str], pairs: Sequence[tuple[str, str]], count: int, size: int) -> Scenes:
    """About so many scenes to train on: half of them of one name and, if there are pairs, half of two."""
    half = count // 2 if pairs else 0
    if len(pairs) > half:  # some of them, evenly
        pairs = [pairs[k * len(pairs) // half] for k in range(half)]
    per_pair = -(-half // len(pairs)) if pairs else 0
    per_name = -(-max(1, count - per_pair * len(pairs)) // len(names))
    return Scenes(names, pairs, per_name, per_pair, size, seed=1)


def draw(world: Any, wanted: dict[tuple[str, ...], int], seed: int) -> list[tuple[np.ndarray, dict[int, np.ndarray]]]:
    """Scenes (image uint8 [H,W,3], masks by name index) until there are as many of each key as are wanted."""
    left, scenes = {key: count for key, count in wanted.items() if count}, []
    total = sum(left.values())
    for step in range(PATIENCE * (1 + total // BATCH) + len(world.names)):
        if not left:
            break
        scene = world.render(BATCH, torch.Generator().manual_seed((seed << 32) + step), captions=False)
        images = to_uint8(scene.images).numpy()
        for b, objects in enumerate(scene.objects.tolist()):
            drawn = [k for k in objects if k >= 0]
            key = tuple(sorted(world.names[k] for k in drawn))
            masks = {k: (scene.labels[b] == o).numpy() for o, k in enumerate(drawn, 1)}
            if key in left and all(mask.mean() >= LEAST_AREA for mask in masks.values()):
                scenes.append((images[b], masks))
                left[key] -= 1
                if not left[key]:
                    del left[key]
    return scenes
