"""PASCAL VOC 2012's layout.

    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClass/<id>.png     palette, class ids; 0 background, 255 void
    VOCdevkit/VOC2012/SegmentationObject/<id>.png    palette, 1, 2, ... by object
    VOCdevkit/VOC2012/ImageSets/Segmentation/        train.txt, val.txt, trainval.txt with one id a line
    VOCdevkit/VOC2012/labelmap.txt                   name:R,G,B:: of every class

One mask covers all of a kind, so an "object" is all of a class that the image shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    class_colour,
    class_map,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
    object_map,
)
from grounded_diffusion.engine.dataset.formats.tables import write_lines
from grounded_diffusion.engine.dataset.record import SPLITS, Record
from grounded_diffusion.engine.dataset.storage.base import Storage

ROOT = "VOCdevkit/VOC2012"


class VocFormat(Format):
    """See common.Format."""

    name = "voc"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        files = {
            f"{ROOT}/JPEGImages/{record.id}.jpg": encode_image(record.image, self.settings.jpeg_quality),
            f"{ROOT}/SegmentationClass/{record.id}.png": encode_labels(class_map(record, self.settings)),
            f"{ROOT}/SegmentationObject/{record.id}.png": encode_labels(object_map(record, self.settings)),
        }
        objects = describe_objects(record, self.settings.classes)
        return Encoded(files, {**describe(record), "split": record.split, "objects": objects})

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        folder = f"{ROOT}/ImageSets/Segmentation"
        lines = ((name, row["id"]) for row in rows for name in (row["split"], "trainval"))
        written = write_lines(storage, lines, lambda name: f"{folder}/{name}.txt")
        for name in {*SPLITS, "trainval"} - written.keys():
            storage.put(f"{folder}/{name}.txt", b"")
        labelmap = ["# label:color_rgb:parts:actions", "background:0,0,0::"]
        for k, name in self.settings.classes.items():
            labelmap.append(f"{name}:{','.join(map(str, class_colour(k)))}::")
        storage.put(f"{ROOT}/labelmap.txt", "".join(f"{line}\n" for line in labelmap).encode())
