"""Pages of pictures: the best, the middling and the worst of each group, by IoU and not by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from grounded_diffusion.files import replace_file
from grounded_diffusion.training.evaluation.images import TestImages
from grounded_diffusion.training.evaluation.lab import key_of
from grounded_diffusion.training.evaluation.methods import Method
from grounded_diffusion.training.evaluation.tally import GROUPS

SIDE = 96  # pixels of a tile
EACH = 3  # pictures of the best, of the middle and of the worst, to a group
GAP = 4
QUALITY = 90  # of WebP
COLOURS = np.array([[230, 60, 50], [40, 110, 230]], np.float32)  # of the first and the second object


def places(scores: Sequence[tuple[int, str, float]], group: str) -> list[int]:
    """Places of the best, the median and the worst images of a group, in this order; [] where it has too few."""
    ordered = [place for place, one, _ in sorted(scores, key=lambda s: (-s[2], s[0])) if one == group]
    if len(ordered) < 3 * EACH:
        return []
    middle = (len(ordered) - EACH) // 2
    return [*ordered[:EACH], *ordered[middle : middle + EACH], *ordered[-EACH:]]


def tile(image: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
    """An image uint8 [H,W,3] as a square, what is in a mask of bool [O,H,W] tinted and the rest dimmed."""
    pixels = image.astype(np.float32)
    if masks is not None:
        pixels = pixels * np.where(masks.any(0), 1.0, 0.35)[..., None]
        for colour, mask in zip(COLOURS, masks, strict=False):
            pixels[mask] = 0.6 * pixels[mask] + 0.4 * colour
    return np.asarray(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX))


def write_page(
    file: Path, images: TestImages, scores: Sequence[tuple[int, str, float]], method: Callable[[], Method]
) -> None:
    """A page with three rows a group: the image, what the method masks, what is true. Written once a set of scores."""
    rows = [found for group in GROUPS if (found := places(scores, group))]
    of, known = file.with_suffix(".of"), key_of([images.examples.folder.name, scores])  # whose page it is
    if not rows or (file.is_file() and of.is_file() and of.read_text(encoding="utf-8") == known):
        return
    looking, step = method(), SIDE + GAP
    page = np.full((len(rows) * (3 * step + 2 * GAP), 3 * EACH * step + 4 * GAP, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, place in enumerate(row):
            example = images.examples[place]
            image = images.examples.image(place)
            masks = looking.look([(place, example)])([example.names])[0]
            left = c * step + (c // EACH) * 2 * GAP
            for k, picture in enumerate((tile(image), tile(image, as_bool(masks)), tile(image, example.masks))):
                top = r * (3 * step + 2 * GAP) + k * step
                page[top : top + SIDE, left : left + SIDE] = picture
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).save(file, quality=QUALITY, method=6)
    replace_file(of, known.encode())


def as_bool(masks: torch.Tensor) -> np.ndarray:
    return masks.cpu().numpy().astype(np.bool_)
