"""Soft photographic backgrounds: a ground in perspective below a horizon, under a sky, a photograph or a wall."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from grounded_diffusion.training.things.meshes import ZERO_AD

TERRAIN = "art/textures/terrain/types/"
# What 0 A.D. calls its ground, by the word of our captions.
SURFACES = {
    "grass": r"(^|/)(temp_grass|medit_grass|new_alpine_grass|alpine_grass|temperate/grass_0)[\w ]*\.",
    "sand": r"(^|/)(desert_sand|sand_|sahara/sand|nubia/sand|medit_sand|beach)[\w ]*\.",
    "snow": r"(^|/)(polar_snow|alpine_snow|snow|polar_ice)[\w ]*\.",
    "dirt": r"(^|/)(temp_dirt|steppe_dirt|savanna_dirt|medit_dirt|tropic_dirt|dirta)[\w ]*\.",
    "stone": r"(^|/)(medit_rocks|steppe_river_rocks|desert_shore_stones|alpine_shore_rocks|temp_road|road)[\w ]*\.",
    "tiles": r"(^|/)(medit_city_tile|new_alpine_citytile|temp_city|[a-z]*/paving_0)[\w ]*\.",
}
PHOTOGRAPHS = {  # of lomiri-wallpapers-16.04: author and licence, from its debian/copyright
    "Bridge_by_Sander_Klootwijk.jpg": ("Sander Klootwijk", "CC-BY-SA-4.0"),
    "aitzgorri_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "greentock_by_Peter_Nerlich.jpg": ("Peter Nerlich", "CC-BY-SA-4.0"),
    "life_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "picosdeeuropa_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
    "seeding_by_Clements_Engelhardt.jpg": ("Clemens Engelhardt", "CC0-1.0"),
    "sunset_by_Aitzol_Berasategi.jpg": ("Aitzol Berasategi", "CC-BY-4.0"),
}
SKIES = np.array(
    [  # colour at the top and at the horizon
        [[0.36, 0.56, 0.86], [0.78, 0.87, 0.95]],
        [[0.52, 0.66, 0.85], [0.86, 0.89, 0.92]],
        [[0.66, 0.69, 0.73], [0.85, 0.85, 0.85]],
        [[0.45, 0.45, 0.66], [0.95, 0.75, 0.58]],
    ]
)
WALLS = np.array([[0.86, 0.84, 0.80], [0.74, 0.78, 0.72], [0.66, 0.72, 0.80], [0.80, 0.70, 0.62]])
SEAS = np.array([[0.16, 0.36, 0.50], [0.20, 0.46, 0.52], [0.30, 0.42, 0.54]])
TILE = 256  # pixels of a ground texture


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    pixels = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(pixels.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def ground(texture: np.ndarray, size: int, horizon: float, rng: np.random.Generator, repeat: float) -> np.ndarray:
    """A texture [t,t,3] laid out to the horizon, seen from eye height -> [size,size,3]; nothing above the horizon."""
    samples, shift = 4, rng.random(2)
    y, x = np.mgrid[0 : size * samples, 0 : size * samples] / (size * samples)
    distance = 0.25 / np.maximum(y - horizon, 0.25 / (size * samples))
    u, v = ((x - 0.5) * distance * repeat + shift[0]) % 1, (distance * repeat * 0.5 + shift[1]) % 1
    t = len(texture)
    laid = texture[(v * t).astype(int) % t, (u * t).astype(int) % t]
    return laid.reshape(size, samples, size, samples, 3).mean((1, 3))


def backdrop(kind: int, size: int, photographs: list[Image.Image], rng: np.random.Generator) -> np.ndarray:
    """What stands behind the ground [size,size,3]: a sky (0), a photograph out of focus (1) or a wall (2)."""
    if kind == 1:
        photograph = photographs[rng.integers(len(photographs))]
        side = int(rng.uniform(0.4, 0.9) * min(photograph.size))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        return _blur(np.asarray(crop, np.float32) / 255, size / 24)
    if kind == 2:
        return np.broadcast_to(WALLS[rng.integers(len(WALLS))] * rng.uniform(0.85, 1.1), (size, size, 3))
    high, low = SKIES[rng.integers(len(SKIES))] * rng.uniform(0.9, 1.05)
    mix = np.linspace(0, 1, size)[:, None, None] ** 0.8
    return np.broadcast_to(high * (1 - mix) + low * mix, (size, size, 3))


def scene(
    texture: np.ndarray,
    kind: int,
    size: int,
    photographs: list[Image.Image],
    rng: np.random.Generator,
    repeat: float = 0.6,
) -> np.ndarray:
    """A whole background [size,size,3] in [0,1], slightly out of focus."""
    horizon = rng.uniform(0.3, 0.5)
    back = backdrop(kind, size, photographs, rng)
    # A backdrop of its own height, so that a sky ends pale at the horizon.
    back = back[(np.arange(size) / max(horizon, 0.01)).clip(0, size - 1).astype(int)] if kind == 0 else back
    front = ground(texture, size, horizon, rng, repeat)
    y = np.arange(size)[:, None, None] / size
    haze = np.clip(1 - (y - horizon) * 3, 0, 1) * (0.5 if kind == 0 else 0.15)
    front = front * (1 - haze) + back[int(horizon * size)].mean(0) * haze
    image = np.where(y < horizon, back, front * rng.uniform(0.85, 1.1))
    return _blur(image, rng.uniform(1.0, 1.8))


def water(rng: np.random.Generator) -> np.ndarray:
    """A texture of calm water [t,t,3] that tiles."""
    waves = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TILE, TILE))) * _ripple()).real
    return np.clip(SEAS[rng.integers(len(SEAS))] + 0.05 * (waves / waves.std())[..., None], 0, 1)


def _ripple() -> np.ndarray:
    fy, fx = np.meshgrid(np.fft.fftfreq(TILE) * TILE, np.fft.fftfreq(TILE) * TILE, indexing="ij")
    return np.exp(-((np.hypot(fx * 2, fy) - 14) ** 2) / 50)


def sky(size: int, photographs: list[Image.Image], rng: np.random.Generator) -> np.ndarray:
    """Nothing but sky [size,size,3], with soft clouds."""
    coarse = Image.fromarray(rng.integers(0, 256, (4, 7), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    clouds = _blur(np.repeat(np.asarray(coarse, np.float32)[..., None] / 255, 3, -1), size / 16)
    return np.clip(backdrop(0, size, photographs, rng) + 0.3 * (clouds - 0.5), 0, 1)


def render_backgrounds(zero_ad: Path, wallpapers: Path, size: int, count: int) -> dict[str, np.ndarray]:
    """Backgrounds by surface, [count,size,size,3] in [0,1] each.

    Args:
        zero_ad, wallpapers: the folders in which 0ad-data and lomiri-wallpapers-16.04 were unpacked.
        size: side in pixels.
        count: of each surface.
    """
    archive, rng = zipfile.ZipFile(zero_ad / ZERO_AD), np.random.default_rng(0)
    photographs = [Image.open(wallpapers / "usr/share/backgrounds" / name).convert("RGB") for name in PHOTOGRAPHS]
    for photograph in photographs:
        photograph.thumbnail((700, 700))
    names = sorted(n for n in archive.namelist() if n.startswith(TERRAIN) and n.endswith(".dds"))
    names = [n for n in names if not re.search(r"norm|spec|cliff|test", n, re.I)]
    result = {}
    for surface, pattern in SURFACES.items():
        files = [n for n in names if re.search(pattern, n.removeprefix(TERRAIN))]
        files = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]
        textures = [
            np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB").resize((TILE, TILE)), np.float32) / 255
            for n in files
        ]
        kinds = (1, 2, 2) if surface == "tiles" else (0, 0, 1)
        result[surface] = np.stack(
            [scene(textures[k % len(textures)], kinds[k % 3], size, photographs, rng) for k in range(count)]
        )
    result["water"] = np.stack([scene(water(rng), (0, 0, 1)[k % 3], size, photographs, rng, 1.5) for k in range(count)])
    result["sky"] = np.stack([sky(size, photographs, rng) for _ in range(count)])
    return result
