"""The emoji world: a batched renderer of captioned images with exact masks.

Glyphs of the open font Noto Color Emoji (SIL OFL 1.1; see glyphs.py) are placed on smooth, lightly textured
backgrounds. Every mask is known exactly, and everything is drawn in torch, so that one CPU core
keeps a small trainer fed and a GPU is never starved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.emoji.glyphs import read_glyph

# name -> (glyph, hypernym). The first twenty are the PASCAL VOC classes; "dining table" has no glyph,
# so a laid place stands in for it. The last eight follow the paper's figures.
NAMES: dict[str, tuple[str, str]] = {
    "aeroplane": ("🛩", "aircraft"),
    "bicycle": ("🚲", "vehicle"),
    "bird": ("🐦", "animal"),
    "boat": ("⛵", "vehicle"),
    "bottle": ("🍾", "thing"),
    "bus": ("🚌", "vehicle"),
    "car": ("🚗", "vehicle"),
    "cat": ("🐈", "animal"),
    "chair": ("🪑", "furniture"),
    "cow": ("🐄", "animal"),
    "dining table": ("🍽", "furniture"),
    "dog": ("🐕", "animal"),
    "horse": ("🐎", "animal"),
    "motorbike": ("🏍", "vehicle"),
    "person": ("🧍", "human"),
    "potted plant": ("🪴", "plant"),
    "sheep": ("🐑", "animal"),
    "sofa": ("🛋", "furniture"),
    "train": ("🚂", "vehicle"),
    "tv monitor": ("📺", "thing"),
    "unicorn": ("🦄", "animal"),
    "dragon": ("🐉", "animal"),
    "dinosaur": ("🦕", "animal"),
    "rocket": ("🚀", "aircraft"),
    "shark": ("🦈", "animal"),
    "whale": ("🐋", "animal"),
    "turtle": ("🐢", "animal"),
    "tree": ("🌳", "plant"),
}

# Split 1 of the paper's Table 4, widened by one of our own names.
UNSEEN: tuple[str, ...] = ("tv monitor", "car", "dog", "sofa", "train", "unicorn")
SEEN: tuple[str, ...] = tuple(name for name in NAMES if name not in UNSEEN)

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.78, 0.25, 0.25),
    "orange": (0.90, 0.60, 0.30),
    "yellow": (0.92, 0.86, 0.45),
    "green": (0.42, 0.68, 0.42),
    "blue": (0.40, 0.58, 0.85),
    "purple": (0.60, 0.45, 0.75),
    "grey": (0.58, 0.58, 0.58),
    "white": (0.93, 0.93, 0.93),
}


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """How the world is drawn. Lengths are fractions of the image's side.

    Attributes:
        size: side of the square image in pixels.
        single: smallest and largest extent of the object in one-object images.
        pair: the same for the two objects of two-object images.
        pair_share: share of images with two objects.
        rotation: largest rotation either way, in degrees.
        flip: share of glyphs mirrored left to right.
        tint: largest relative change of each colour channel of a glyph.
    """

    size: int = 64
    single: tuple[float, float] = (0.55, 0.85)
    pair: tuple[float, float] = (0.42, 0.52)
    pair_share: float = 0.35
    rotation: float = 8.0
    flip: float = 0.0
    tint: float = 0.08

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


@dataclass(frozen=True, slots=True)
class Scene:
    """A batch of rendered images.

    Attributes:
        images: [B,3,S,S] float32 in [-1, 1].
        labels: [B,S,S] uint8; 0 background, k the k-th object of the caption.
        objects: [B,2] int64 indices into the name list, -1 where there is no second object.
        captions: B strings.
    """

    images: torch.Tensor
    labels: torch.Tensor
    objects: torch.Tensor
    captions: list[str]


def glyph_bank(names: list[str], size: int) -> torch.Tensor:
    """Premultiplied RGBA glyphs [N,4,size,size] in [0, 1], each cropped and fitted to the square."""
    bank = []
    for name in names:
        if name not in NAMES:
            raise UsageError(f"no glyph is known for {name!r}; known names: {', '.join(NAMES)}")
        glyph = read_glyph(list(NAMES).index(name))
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        rgba = np.asarray(square, np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        bank.append(torch.from_numpy(rgba).permute(2, 0, 1))
    return torch.cat([F.interpolate(g[None], (size, size), mode="area") for g in bank])


class World:
    """Draws captioned scenes. All randomness comes from the generator that is passed in.

    Args:
        config: how the world is drawn.
        names: the vocabulary; defaults to all of NAMES.
        device: where scenes are drawn.
    """

    def __init__(
        self,
        config: WorldConfig,
        names: list[str] | None = None,
        device: str = "cpu",
    ):
        self.config = config
        self.names = list(names or NAMES)
        self.bank = glyph_bank(self.names, config.size).to(device)
        self.colours = torch.tensor(list(COLOURS.values()))

    def render(self, batch: int, generator: torch.Generator, captions: bool = True) -> Scene:
        """A batch of scenes with one or two objects each."""
        cfg, device = self.config, self.bank.device
        uniform = lambda *shape: torch.rand(*shape, generator=generator).to(device)
        paired = uniform(batch) < cfg.pair_share
        objects = (uniform(batch, 2) * len(self.names)).long()
        objects[:, 1] = torch.where(
            objects[:, 1] == objects[:, 0], (objects[:, 1] + 1) % len(self.names), objects[:, 1]
        )
        colour = (uniform(batch) * len(COLOURS)).long()

        image = self._background(colour, uniform)
        labels = torch.zeros(batch, cfg.size, cfg.size, dtype=torch.uint8, device=device)
        swap = uniform(batch) < 0.5
        for k in range(2):
            drawn = paired if k else torch.ones_like(paired)
            glyph = self._place(objects[:, k], self._centres(k, paired, swap, uniform), uniform)
            glyph = glyph * drawn[:, None, None, None]
            image = image * (1 - glyph[:, 3:]) + glyph[:, :3]
            labels = torch.where(glyph[:, 3] > 0.5, k + 1, labels)
        objects = torch.where(paired[:, None] | torch.tensor([True, False], device=device), objects, -1)
        text = self._captions(objects, colour, generator) if captions else []
        return Scene(image.clamp(0, 1) * 2 - 1, labels.to(torch.uint8), objects, text)

    def _background(self, colour: torch.Tensor, uniform) -> torch.Tensor:
        """One colour with a mild gradient, soft clouds and grey grain -> [B,3,S,S]."""
        b, s = len(colour), self.config.size
        base = self.colours.to(colour.device)[colour] + (uniform(b, 3) - 0.5) * 0.1
        angle = uniform(b) * 2 * torch.pi
        line = torch.linspace(-0.5, 0.5, s, device=colour.device)
        ramp = angle.cos()[:, None, None] * line + angle.sin()[:, None, None] * line[:, None]
        clouds = F.interpolate(uniform(b, 1, 5, 5) - 0.5, (s, s), mode="bicubic", align_corners=False)
        grain = uniform(b, 1, s, s) - 0.5
        return base[:, :, None, None] + ramp[:, None] * 0.2 + clouds * 0.12 + grain * 0.02

    def _centres(self, k: int, paired: torch.Tensor, swap: torch.Tensor, uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """Extent [B] and centre [B,2] of the k-th object, both in units of the half side."""
        cfg, b = self.config, len(paired)
        low = torch.where(paired, cfg.pair[0], cfg.single[0])
        high = torch.where(paired, cfg.pair[1], cfg.single[1])
        extent = low + (high - low) * uniform(b)
        slack = (uniform(b, 2) * 2 - 1) * (1 - extent[:, None])
        side = torch.where(swap, -1.0, 1.0) * (1 - 2 * k)
        x = torch.where(paired, side * 0.5 + slack[:, 0] * 0.08, slack[:, 0])
        return extent, torch.stack([x, slack[:, 1]], 1)

    def _place(self, index: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], uniform) -> torch.Tensor:
        """Glyphs [B,4,S,S], premultiplied, rotated, scaled, tinted and moved."""
        cfg, b, (extent, centre) = self.config, len(index), where
        angle = (uniform(b) * 2 - 1) * np.deg2rad(cfg.rotation)
        mirror = torch.where(uniform(b) < cfg.flip, -1.0, 1.0)
        cos, sin = angle.cos() / extent, angle.sin() / extent
        linear = torch.stack([torch.stack([cos * mirror, sin * mirror], 1), torch.stack([-sin, cos], 1)], 1)
        offset = -(linear @ centre[:, :, None])
        grid = F.affine_grid(torch.cat([linear, offset], 2), (b, 4, cfg.size, cfg.size), align_corners=False)
        glyph = F.grid_sample(self.bank[index], grid, mode="bilinear", align_corners=False)
        tint = 1 + (uniform(b, 3) * 2 - 1) * cfg.tint
        return torch.cat([glyph[:, :3] * tint[:, :, None, None], glyph[:, 3:]], 1)

    def _captions(self, objects: torch.Tensor, colour: torch.Tensor, generator: torch.Generator) -> list[str]:
        """One caption a scene: the paper's templates, some with the background's colour or a hypernym."""
        colours, dice = list(COLOURS), torch.rand(len(objects), 2, generator=generator).tolist()
        texts = []
        for (first, second), c, (p, q) in zip(objects.tolist(), colour.tolist(), dice, strict=True):
            text = f"a photograph of a {self.names[first]}"
            if second >= 0:
                text += f"{' next to' if q > 0.8 else ' and'} a {self.names[second]}"
            elif q > 0.8:
                text += f", a kind of {NAMES[self.names[first]][1]}"
            texts.append(text + f" on a {colours[c]} background" if p < 0.4 else text)
        return texts
