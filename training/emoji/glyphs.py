"""The glyphs of the emoji world, kept as one picture so that training needs no font.

`glyphs.png` was drawn from Noto Color Emoji, copyright Google, under the SIL Open Font License 1.1
(https://openfontlicense.org); `atlas.py` draws it again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image

TILE = 160  # pixels; the font's one strike is 136x128
COLUMNS = 7


@cache
def _atlas() -> Image.Image:
    return Image.open(Path(__file__).with_name("glyphs.png")).convert("RGBA")


def read_glyph(index: int) -> Image.Image:
    """RGBA picture of the glyph of the index-th name, cropped to what is drawn."""
    x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
    tile = _atlas().crop((x, y, x + TILE, y + TILE))
    return tile.crop(tile.getbbox())
