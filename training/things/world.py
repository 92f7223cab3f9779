"""The things world: a batched renderer of captioned images with exact masks, from the checked-in bank.

Sprites of textured 3D models and animals stand on photographic, slightly blurred backgrounds, with a contact shadow and
the background's light. Everything is drawn in torch from one generator, so that a CPU core keeps a trainer fed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.things.bank import load_backgrounds, load_sprites, read_index

NAMES: dict[str, str] = {name: entry["kind"] for name, entry in read_index()["names"].items()}  # name -> hypernym
SURFACES: tuple[str, ...] = tuple(read_index()["surfaces"])
# Where a thing may be: whales and boats in the water, aeroplanes in the sky, the rest on any ground.
GROUNDS = tuple(s for s in SURFACES if s not in ("water", "sky"))
WORDS: tuple[str, ...] = (*NAMES, *SURFACES, *NAMES.values())  # of the captions, beside those of their templates

SHADOW = 0.5  # how much light the contact shadow takes
SQUEEZE = 4.0  # height of a thing over that of its shadow


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """How the world is drawn. Lengths are fractions of the image's side.

    Attributes:
        size: side of the square image in pixels.
        models: how many models of a name appear; 0 for all. Every sprite is one more thing for a base model to learn.
        views: how many views of a model appear; 0 for all.
        single: smallest and largest extent of the object in one-object images.
        pair: the same for the two objects of two-object images.
        pair_share: share of images with two objects.
        rotation: largest rotation either way, in degrees.
        flip: share of sprites mirrored left to right.
        tint: largest relative change of each colour channel of a sprite.
    """

    size: int = 64
    models: int = 1
    views: int = 1
    single: tuple[float, float] = (0.6, 0.9)
    pair: tuple[float, float] = (0.44, 0.54)
    pair_share: float = 0.3
    rotation: float = 2.0
    flip: float = 0.5
    tint: float = 0.05

    def __post_init__(self):
        if self.size % 8 or self.size < 16:
            raise UsageError(f"world.size is {self.size}; it must be a multiple of 8, at least 16")
        for field in ("single", "pair"):
            low, high = getattr(self, field)
            if not 0 < low <= high <= 1:
                raise UsageError(f"world.{field} is ({low}, {high}); it must satisfy 0 < low <= high <= 1")
        if not (math.isfinite(self.rotation) and 0 <= self.tint <= 1):
            raise UsageError("world.rotation must be a finite number of degrees, and world.tint lie in [0, 1]")
        if not 0 <= self.pair_share <= 1 or not 0 <= self.flip <= 1:
            raise UsageError("world.pair_share and world.flip are shares; they must lie in [0, 1]")
        if self.models < 0 or self.views < 0:
            raise UsageError("world.models and world.views are counts; 0 takes all there are")


@dataclass(frozen=True, slots=True)
class Scene:
    """A batch of rendered images.

    Attributes:
        images: [B,3,S,S] float32 in [-1, 1].
        labels: [B,S,S] uint8; 0 background, k the k-th object of the caption.
        objects: [B,2] int64 indices into the world's names, -1 where there is no second object.
        captions: B strings.
    """

    images: torch.Tensor
    labels: torch.Tensor
    objects: torch.Tensor
    captions: list[str]


class World:
    """Draws captioned scenes. All randomness comes from the generator that is passed in.

    Args:
        config: how the world is drawn.
        names: the vocabulary; defaults to all of NAMES.
        device: where scenes are drawn.
        held_out: draw the models that are kept from training, where a name has any.
    """

    def __init__(
        self, config: WorldConfig, names: list[str] | None = None, device: str = "cpu", held_out: bool = False
    ):
        self.config, self.names = config, list(names or NAMES)
        if unknown := [name for name in self.names if name not in NAMES]:
            raise UsageError(f"no sprite is known for {', '.join(unknown)}; known names: {', '.join(NAMES)}")
        sprites = load_sprites(self.names, config.size, config.models, config.views, held_out)
        self.bank = sprites.pictures.to(device)
        self.first, self.count, self.floor = (t.to(device) for t in (sprites.first, sprites.count, sprites.floor))
        self.backgrounds = load_backgrounds(config.size)[0].to(device)
        places = [read_index()["names"][name]["place"] for name in self.names]
        allowed = [[s == place if place in SURFACES else s in GROUNDS for s in SURFACES] for place in places]
        self.allowed = torch.tensor(allowed, dtype=torch.float, device=device)  # [names,surfaces]
        self.stands = torch.tensor([place != "sky" for place in places], device=device)

    def render(self, batch: int, generator: torch.Generator, captions: bool = True) -> Scene:
        """A batch of scenes with one or two objects each."""
        cfg, device = self.config, self.bank.device
        uniform = lambda *shape: torch.rand(*shape, generator=generator).to(device)
        paired = uniform(batch) < cfg.pair_share
        objects = (uniform(batch, 2) * len(self.names)).long()
        objects[:, 1] = torch.where(
            objects[:, 1] == objects[:, 0], (objects[:, 1] + 1) % len(self.names), objects[:, 1]
        )
        cumulative = self.allowed[objects[:, 0]].cumsum(1)
        surface = (cumulative <= uniform(batch, 1) * cumulative[:, -1:]).sum(1)

        image = self._background(surface, uniform)
        light = image.mean((1, 2, 3), keepdim=True)
        labels = torch.zeros(batch, cfg.size, cfg.size, dtype=torch.uint8, device=device)
        swap = uniform(batch) < 0.5
        for k in range(2):
            drawn = (paired if k else torch.ones_like(paired))[:, None, None, None]
            sprite, shadow = self._place(objects[:, k], k, paired, swap, uniform)
            sprite, shadow = sprite * drawn, shadow * drawn
            image = image * (1 - SHADOW * shadow)
            lit = (sprite[:, :3] * (0.75 + 0.5 * light)).clamp(max=1)
            image = image * (1 - sprite[:, 3:]) + lit
            labels = torch.where(sprite[:, 3] > 0.5, k + 1, labels)
        objects = torch.where(paired[:, None] | torch.tensor([True, False], device=device), objects, -1)
        text = self._captions(objects, surface, generator) if captions else []
        return Scene(image.clamp(0, 1) * 2 - 1, labels.to(torch.uint8), objects, text)

    def _background(self, surface: torch.Tensor, uniform) -> torch.Tensor:
        """A background of each surface [B,3,S,S], mirrored and brightened at random, with a little grain."""
        b, s, each = len(surface), self.config.size, len(self.backgrounds) // len(SURFACES)
        image = self.backgrounds[surface * each + (uniform(b) * each).long()]
        image = torch.where(uniform(b, 1, 1, 1) < 0.5, image.flip(3), image)
        return image * (0.85 + 0.3 * uniform(b, 1, 1, 1)) + (uniform(b, 1, s, s) - 0.5) * 0.01

    def _place(self, index, k: int, paired, swap, uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """Sprites [B,4,S,S], premultiplied, of these names, and their contact shadows [B,1,S,S]."""
        cfg, b = self.config, len(index)
        sprite = self.first[index] + (uniform(b) * self.count[index]).long()
        low, high = (torch.where(paired, cfg.pair[i], cfg.single[i]) for i in range(2))
        extent = low + (high - low) * uniform(b)
        slack = (uniform(b, 2) * 2 - 1) * (1 - extent[:, None])
        side = torch.where(swap, -1.0, 1.0) * (1 - 2 * k)
        x = torch.where(paired, side * 0.5 + slack[:, 0] * 0.08, slack[:, 0])
        foot = torch.where(self.stands[index], 0.6 + 0.3 * uniform(b), slack[:, 1] + extent * self.floor[sprite])
        y = torch.maximum(foot - extent * self.floor[sprite], extent - 1.05)
        angle = (uniform(b) * 2 - 1) * np.deg2rad(cfg.rotation)
        mirror = torch.where(uniform(b) < cfg.flip, -1.0, 1.0)
        cos, sin = angle.cos() / extent, angle.sin() / extent
        linear = torch.stack([torch.stack([cos * mirror, sin * mirror], 1), torch.stack([-sin, cos], 1)], 1)
        picture = self._draw(sprite, linear, torch.stack([x, y], 1))
        tint = 1 + (uniform(b, 3) * 2 - 1) * cfg.tint
        picture = torch.cat([picture[:, :3] * tint[:, :, None, None], picture[:, 3:]], 1)
        foot = y + extent * self.floor[sprite]
        return picture, self._shadow(sprite, extent, mirror, x, foot) * self.stands[index, None, None, None]

    def _draw(self, sprite: torch.Tensor, linear: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
        """Sprites [B,4,S,S] mapped by image -> sprite matrices [B,2,2] around their centres [B,2]."""
        offset = -(linear @ centre[:, :, None])
        shape = (len(sprite), 4, self.config.size, self.config.size)
        grid = F.affine_grid(torch.cat([linear, offset], 2), shape, align_corners=False)
        return F.grid_sample(self.bank[sprite], grid, mode="bilinear", align_corners=False)

    def _shadow(self, sprite, extent, mirror, x, foot) -> torch.Tensor:
        """The outline squeezed onto the ground at the feet, leaning away from the sun, and blurred [B,1,S,S]."""
        zero, scale, lift = torch.zeros_like(extent), 1 / extent, extent * self.floor[sprite] / SQUEEZE
        linear = torch.stack([torch.stack([mirror * scale, -scale], 1), torch.stack([zero, SQUEEZE * scale], 1)], 1)
        # The outline's feet are where the sprite's are, a little lower so that the shadow touches them.
        centre = torch.stack([x - mirror * lift, foot - lift + 0.04], 1)
        outline = self._draw(sprite, linear, centre)[:, 3:]
        for _ in range(2):
            outline = F.avg_pool2d(outline, (3, 5), 1, (1, 2), count_include_pad=False)
        return outline

    def _captions(self, objects: torch.Tensor, surface: torch.Tensor, generator: torch.Generator) -> list[str]:
        """One caption a scene: the paper's templates, some with the ground or a hypernym."""
        dice, texts = torch.rand(len(objects), 2, generator=generator).tolist(), []
        for (first, second), s, (p, q) in zip(objects.tolist(), surface.tolist(), dice, strict=True):
            text = f"a photograph of a {self.names[first]}"
            if second >= 0:
                text += f"{' next to' if q > 0.8 else ' and'} a {self.names[second]}"
            elif q > 0.85:
                text += f", a kind of {NAMES[self.names[first]]}"
            texts.append(f"{text} on the {SURFACES[s]}" if p < 0.4 else text)
        return texts
