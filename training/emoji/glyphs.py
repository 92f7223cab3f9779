"""The glyphs of the emoji world, kept as one picture so that training needs no font.

`glyphs.png` was drawn from Noto Color Emoji, copyright Google, under the SIL Open Font License 1.1
(https://openfontlicense.org). Draw it again after a change of `world.NAMES`:

    python -m grounded_diffusion.training.emoji.glyphs NotoColorEmoji.ttf glyphs.png
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 160  # pixels; the font's one strike is 136x128
COLUMNS = 7
FONT_SIZE = 109  # that strike's nominal size


@cache
def _atlas() -> Image.Image:
    return Image.open(Path(__file__).with_name("glyphs.png")).convert("RGBA")


def read_glyph(index: int) -> Image.Image:
    """RGBA picture of the glyph of the index-th name, cropped to what is drawn."""
    x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
    tile = _atlas().crop((x, y, x + TILE, y + TILE))
    return tile.crop(tile.getbbox())


def draw_atlas(characters: list[str], font: str) -> Image.Image:
    """All glyphs on one transparent sheet, filled row by row."""
    face = ImageFont.truetype(font, FONT_SIZE)
    sheet = Image.new("RGBA", (COLUMNS * TILE, -(-len(characters) // COLUMNS) * TILE), (0, 0, 0, 0))
    for index, character in enumerate(characters):
        tile = Image.new("RGBA", (TILE, TILE), (0, 0, 0, 0))
        ImageDraw.Draw(tile).text((8, 8), character, font=face, embedded_color=True)
        sheet.paste(tile, (index % COLUMNS * TILE, index // COLUMNS * TILE))
    return sheet


if __name__ == "__main__":
    from grounded_diffusion.training.emoji.world import NAMES

    draw_atlas([glyph for glyph, _ in NAMES.values()], sys.argv[1]).save(sys.argv[2], optimize=True)
