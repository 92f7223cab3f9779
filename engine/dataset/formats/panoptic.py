"""COCO panoptic.

    images/train/<id>.jpg, images/val/<id>.jpg
    annotations/panoptic_train.json and panoptic_train/<id>.png, the same for val
    annotations/captions_train.json, captions_val.json, and fields beside COCO's own: see coco.py

The PNG's colour is the segment's id, R + 256 G + 65536 B; 0 is void, and so is the background. Segments do not
overlap: a pixel belongs to the object on top. An object has the colour of its class, and so the same id in every image;
where connected parts are objects of their own, the third `dog` of class 12 has the id 12003.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.coco import (
    categories,
    image_entry,
    image_path,
    table_head,
    write_captions,
)
from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    class_colour,
    describe,
    encode_image,
    instances_of,
    object_map,
    png,
)
from grounded_diffusion.engine.dataset.formats.tables import Entries, write_tables
from grounded_diffusion.engine.dataset.instances import mask_box
from grounded_diffusion.engine.dataset.record import Record, told
from grounded_diffusion.engine.dataset.storage.base import Storage


class PanopticFormat(Format):
    """See common.Format."""

    name = "coco-panoptic"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        record = instances_of(record, self.settings)
        from PIL import Image

        labels, objects = object_map(record, self.settings), []
        colours = np.zeros((256, 3), np.uint8)
        seen: Counter[int] = Counter()
        for thing in record.objects:
            category, mask = self.settings.classes.id(thing.name), labels == thing.label
            colour = class_colour(category)
            if self.settings.instances is not None:
                colour = instance_colour(category, seen[category])
                seen[category] += 1
            colours[thing.label] = colour
            entry = {"name": thing.name, "label": category, "area": int(mask.sum()), "box": mask_box(mask)}
            segment = {} if self.settings.instances is None else {"segment": colour_id(colour)}
            objects.append({**entry, **told(thing), **segment})
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
        write_captions(storage, rows, self.settings)


def annotation(row: dict[str, Any]) -> dict[str, Any]:
    """COCO's entry for an image's segments."""
    segments = [
        {
            "id": thing.get("segment", colour_id(class_colour(thing["label"]))),
            "category_id": thing["label"],
            "area": thing["area"],
            "bbox": thing["box"],
            "iscrowd": 0,
            "score": thing["score"],
        }
        for thing in row["objects"]
        if thing["area"]
    ]
    return {"image_id": row["index"] + 1, "file_name": f"{row['id']}.png", "segments_info": segments}


def instance_colour(category: int, number: int) -> list[int]:
    """The colour of a class's object `number` in an image, from 0: that of the id category * 1000 + number + 1."""
    id = category * 1000 + number + 1
    return [id % 256, id // 256 % 256, id // 65536]


def colour_id(colour: list[int]) -> int:
    """The segment id that a colour stands for."""
    return colour[0] + 256 * colour[1] + 65536 * colour[2]
