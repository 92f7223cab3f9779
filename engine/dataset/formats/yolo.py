"""YOLO: `images/train/<id>.jpg`, `labels/train/<id>.txt`, `data.yaml`; classes from 0 in the order of the names,
coordinates in [0, 1].

    yolo        class x y width height, of the box; x and y are its centre
    yolo-seg    class x1 y1 x2 y2 ..., of an outline

Outlines lose two things, which `losses` counts: holes are filled, and an object of several pieces becomes several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    describe,
    describe_objects,
    encode_image,
    instances_of,
)
from grounded_diffusion.engine.dataset.formats.polygons import contours
from grounded_diffusion.engine.dataset.formats.tables import count_splits, yaml_string
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.rows import OutlinedRow
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.sampling.sample import ObjectMask


class YoloFormat(Format):
    """Boxes. See common.Format."""

    name = "yolo"

    def __init__(self, settings: Settings):
        self.settings = settings
        self.order = {category: k for k, category in enumerate(settings.classes.ids)}

    def encode(self, record: Record) -> Encoded:
        record = instances_of(record, self.settings)
        lines, objects = [], describe_objects(record, self.settings.classes)
        for thing, described in zip(record.objects, objects, strict=True):
            category = self.order[described["label"]]
            for values in self.shapes(record, thing, described):
                lines.append(f"{category} {' '.join(f'{value:.6f}' for value in values)}\n")
        image = encode_image(record.image, self.settings.jpeg_quality)
        files = {
            f"labels/{record.split}/{record.id}.txt": "".join(lines).encode(),
            f"images/{record.split}/{record.id}.{self.settings.suffix}": image,
        }
        return Encoded(files, {**describe(record), "split": record.split, "objects": objects})

    def shapes(self, record: Record, thing: ObjectMask, described: dict[str, Any]) -> Iterator[list[float]]:
        """Numbers of each line of an object; `described` may be added to."""
        x, y, width, height = thing.box
        if thing.area:
            yield [(x + width / 2) / record.width, (y + height / 2) / record.height,
                   width / record.width, height / record.height]  # fmt: skip

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        # Without a split of its own, validation reads the training images: YOLO's readers insist on both.
        counts = count_splits(rows)
        val = "val" if "val" in counts else "train"
        train = "train" if "train" in counts else val
        names = "".join(
            f"  {k}: {yaml_string(name, ascii=True)}\n" for k, name in enumerate(self.settings.classes.names)
        )
        storage.put("data.yaml", f"train: images/{train}\nval: images/{val}\nnames:\n{names}".encode())


class YoloSegFormat(YoloFormat):
    """Outlines. See common.Format."""

    name = "yolo-seg"
    row = OutlinedRow

    def shapes(self, record: Record, thing: ObjectMask, described: dict[str, Any]) -> Iterator[list[float]]:
        outer, holes = contours(thing.mask)
        described |= {"pieces": len(outer), "holes": len(holes)}
        for points in outer:
            yield [value for x, y in points for value in (x / record.width, y / record.height)]

    def losses(self, rows: Iterable[dict[str, Any]]) -> str:
        filled = split = 0
        for row in rows:
            for thing in row["objects"]:
                filled += thing["holes"]
                split += thing["pieces"] > 1
        if not filled and not split:
            return ""
        return f"YOLO's polygons filled {filled} holes and split {split} objects into pieces"
