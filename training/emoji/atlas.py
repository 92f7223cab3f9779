"""Draws the glyphs of the emoji world from a font, after a change of `world.NAMES`:

python -m grounded_diffusion.training.emoji.atlas NotoColorEmoji.ttf glyphs.png
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw, ImageFont

from grounded_diffusion.training.emoji.glyphs import COLUMNS, TILE
from grounded_diffusion.training.emoji.world import NAMES

FONT_SIZE = 109  # the nominal size of the font's one strike


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
    draw_atlas([glyph for glyph, _ in NAMES.values()], sys.argv[1]).save(sys.argv[2], optimize=True)
