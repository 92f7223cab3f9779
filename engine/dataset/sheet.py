"""A sheet of samples: each image beside the same image under its masks, the objects named in the masks' colours."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import VOID, voc_palette
from grounded_diffusion.engine.dataset.reader import read_array
from grounded_diffusion.engine.dataset.storage.base import Storage

SAMPLES, COLUMNS = 12, 3
SIDE, GAP, TEXT = 192, 12, 22  # pixels: of a picture, between two samples, of the line below
EVERY = 1000  # rows: where all classes are shown, how far apart the other samples of the sheet are taken


def choose(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SAMPLES rows: those that show a class for the first time, then some from further on."""
    chosen, spare, seen = [], [], set()
    for number, row in enumerate(rows):
        names = {thing["name"] for thing in row["objects"] if thing["area"]}
        if names - seen and len(chosen) < SAMPLES:
            chosen.append(row)
            seen |= names
        elif names and len(spare) < SAMPLES and (number < EVERY or number % EVERY == 0):
            spare.append(row)
    return sorted([*chosen, *spare][:SAMPLES], key=lambda row: row["index"])


def draw_sheet(storage: Storage, rows: list[dict[str, Any]]) -> bytes:
    """The sheet of some rows of a data set of the format "folder", as PNG. Raises UsageError for damaged files."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, max(1, len(rows)))
    lines = -(-len(rows) // columns)
    width, height = 2 * SIDE + GAP, SIDE + TEXT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, lines * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, row in enumerate(rows):
        x, y = GAP + number % columns * width, GAP + number // columns * height
        image = read_array(storage, row["image"], ("RGB",), (row["height"], row["width"]))
        labels = read_array(storage, row["mask"], ("P", "L"), (row["height"], row["width"]))
        for k, pixels in enumerate((image, overlay(image, labels))):
            picture = Image.fromarray(pixels)
            scale = SIDE / max(picture.size)
            small = picture.resize([max(1, round(side * scale)) for side in picture.size], resample(scale))
            sheet.paste(small, (x + k * SIDE + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        at = x
        for thing in row["objects"]:
            if at + font.getlength(thing["name"]) <= x + 2 * SIDE:
                draw.text((at, y + SIDE + 4), thing["name"], fill=colour(thing["label"], 1.3), font=font)
                at += font.getlength(thing["name"]) + 10
    stream = io.BytesIO()
    sheet.save(stream, "png", optimize=True)
    return stream.getvalue()


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3]: the image, half covered by its labels' colours, the rest darker."""
    colours = np.array([colour(k, 2.0) for k in range(256)], np.float32)
    colours[VOID] = 255
    shade = np.where(labels[..., None] > 0, 0.5 * image + 0.5 * colours[labels], 0.45 * image)
    return shade.round().astype(np.uint8)


def colour(label: int, brightness: float) -> tuple[int, ...]:
    """A label's colour in VOC's palette, brighter."""
    return tuple(min(255, round(brightness * value)) for value in voc_palette()[3 * label : 3 * label + 3])


def resample(scale: float) -> int:
    """How to resize: small images keep their pixels."""
    from PIL import Image

    return Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
