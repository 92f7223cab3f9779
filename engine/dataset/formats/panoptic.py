"""COCO panoptic.

    images/train/<id>.jpg, images/val/<id>.jpg
    annotations/panoptic_train.json and panoptic_train/<id>.png, the same for val

The PNG's colour is the segment's id, R + 256 G + 65536 B; 0 is void, and so is the background. Segments do not
overlap: a pixel belongs to the object on top. An object has the colour of its class, and so the same id in every image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.coco import categories, image_entry, image_path, table_head
from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    class_colour,
    describe,
    encode_image,
    mask_box,
    object_map,
    png,
)
from grounded_diffusion.engine.dataset.formats.tables import Entries, write_tables
from grounded_diffusion.engine.dataset.record import Record, told
from grounded_diffusion.engine.dataset.storage.base import Storage


class PanopticFormat(Format):
    """See common.Format."""

    name = "coco-panoptic"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        from PIL import Image

        labels, objects = object_map(record, self.settings), []
        colours = np.zeros((256, 3), np.uint8)
        for thing in record.objects:
            category, mask = self.settings.classes.id(thing.name), labels == thing.label
            colours[thing.label] = class_colour(category)
            entry = {"name": thing.name, "label": category, "area": int(mask.sum()), "box": mask_box(mask)}
            objects.append({**entry, **told(thing)})
        files = {
            f"annotations/panoptic_{record.split}/{record.id}.png": png(Image.fromarray(colours[labels])),
            image_path(record, self.settings): encode_image(record.image, self.settings.jpeg_quality),
        }
        return Encoded(files, {**describe(record), "split": record.split, "objects": objects})

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        table = categories(self.settings.classes)
        head = table_head([{**entry, "isthing": 1, "color": class_colour(entry["id"])} for entry in table])
        lists: dict[str, Entries] = {
            "images": ((row["split"], image_entry(row, self.settings)) for row in rows),
            "annotations": ((row["split"], annotation(row)) for row in rows),
        }
        write_tables(storage, head, lists, lambda split: f"annotations/panoptic_{split}.json")


def annotation(row: dict[str, Any]) -> dict[str, Any]:
    """COCO's entry for an image's segments."""
    segments = [
        {
            "id": colour_id(class_colour(thing["label"])),
            "category_id": thing["label"],
            "area": thing["area"],
            "bbox": thing["box"],
            "iscrowd": 0,
        }
        for thing in row["objects"]
        if thing["area"]
    ]
    return {"image_id": row["index"] + 1, "file_name": f"{row['id']}.png", "segments_info": segments}


def colour_id(colour: list[int]) -> int:
    """The segment id that a colour stands for."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]
