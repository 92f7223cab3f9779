"""The contact sheet: one self-contained HTML page over the files of a run."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.outline import outline, reduce_mask

TEMPLATE = Path(__file__).with_name("gallery.html")


def render_gallery(
    out: Path, records: list[dict[str, Any]], outlines: dict[int, list[str]], settings: dict[str, Any]
) -> str:
    """The page `index.html` of a folder.

    Args:
        out: the folder; masks that have no outline yet (of a resumed run) are read from it.
        records: of `metadata.jsonl`, in order.
        outlines: SVG paths of a record's objects, by the record's index.
        settings: of the run; shown at the top.
    """
    items = []
    for record in records:
        paths = outlines.get(record["index"]) or [
            outline(read_mask(out / thing["mask"])) for thing in record["objects"]
        ]
        pixels = record["width"] * record["height"]
        items.append(
            {
                "id": record["id"],
                "prompt": record["prompt"],
                "image": record["image"],
                "seed": record["seed"],
                "size": [record["width"], record["height"]],
                "grid": grid_size(record["height"], record["width"]),
                "objects": [
                    [thing["name"], round(thing["area"] / pixels, 4), thing["score"], path]
                    for thing, path in zip(record["objects"], paths, strict=True)
                ],
            }
        )
    shown = {key: settings[key] for key in ("sampler", "steps", "guidance_scale", "seed") if key in settings}
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{settings}}", html.escape(" · ".join(f"{k.replace('_', ' ')} {v}" for k, v in shown.items())))
    # Inside a script element only "<" can end the data early.
    data = json.dumps(items, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("{{data}}", data)


def read_mask(path: Path) -> np.ndarray:
    """A binary mask's file as bool [H,W]."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("1"))


def grid_size(height: int, width: int) -> list[int]:
    """[width, height] of the grid that outlines are drawn on."""
    rows, columns = reduce_mask(np.zeros((height, width), np.bool_)).shape
    return [columns, rows]
