"""COCO panoptic.

    images/train/<id>.jpg, images/val/<id>.jpg
    annotations/panoptic_train.json and panoptic_train/<id>.png, the same for val

The PNG's colour is the segment's id, R + 256 G + 65536 B; 0 is void. Segments do not overlap: a pixel belongs to the
object on top. An object has the colour of its class, and so the same id in every image.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.formats.coco import categories, image_entry, new_table, put_image
from grounded_diffusion.engine.formats.common import Settings, mask_box, put_file
from grounded_diffusion.engine.writer import COMPRESSION


class PanopticWriter:
    """See common.Writer."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        self.tables: dict[str, dict[str, Any]] = {}
        self.images = 0

    def put(self, record: Record) -> None:
        from PIL import Image

        self.images += 1
        labels, segments = record.labels, []
        colours = np.zeros((256, 3), np.uint8)
        for thing in record.objects:
            category, mask = self.settings.classes.id(thing.name), labels == thing.label
            colours[thing.label] = colour = class_colour(category)
            if mask.any():
                segment = {"id": colour_id(colour), "category_id": category, "area": int(mask.sum())}
                segments.append({**segment, "bbox": mask_box(mask), "iscrowd": 0})
        stream = io.BytesIO()
        Image.fromarray(colours[labels]).save(stream, "png", compress_level=COMPRESSION)
        put_file(self.folder / "annotations" / f"panoptic_{record.split}" / f"{record.id}.png", stream.getvalue())
        put_image(self.folder, record, self.settings)
        table = self.tables.setdefault(record.split, new_table(self._categories()))
        table["images"].append(image_entry(record, self.images, self.settings))
        table["annotations"].append(
            {"image_id": self.images, "file_name": f"{record.id}.png", "segments_info": segments}
        )

    def _categories(self) -> list[dict[str, Any]]:
        return [
            {**entry, "isthing": 1, "color": class_colour(entry["id"])} for entry in categories(self.settings.classes)
        ]

    def close(self) -> None:
        for split, table in self.tables.items():
            put_file(self.folder / "annotations" / f"panoptic_{split}.json", json.dumps(table, ensure_ascii=False))


def class_colour(k: int) -> list[int]:
    """VOC's colour of a class, for ids beyond its palette too: bits 0, 3, 6, ... of k are the top bits of red, and so
    on. Every k from 0 to 2**24 - 1 has its own."""
    return [sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


def colour_id(colour: list[int]) -> int:
    """The segment id that a colour stands for."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]
