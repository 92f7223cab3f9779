"""YOLO segmentation: `images/train/<id>.jpg`, `labels/train/<id>.txt`, `data.yaml`.

A line is `class x1 y1 x2 y2 ...`, classes from 0, coordinates in [0, 1]. The format loses two things, which `losses`
counts: holes are filled, and an object of several pieces becomes several objects.
"""

from __future__ import annotations

import json
from pathlib import Path

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.formats.common import Settings, encode_image, put_file
from grounded_diffusion.engine.formats.polygons import contours


class YoloWriter:
    """See common.Writer.

    Attributes:
        filled, split: holes that were filled, and objects that were split, so far.
    """

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        self.filled = self.split = 0

    def put(self, record: Record) -> None:
        lines = []
        for thing in record.objects:
            category = self.settings.classes.id(thing.name) - 1
            outer, holes = contours(thing.mask)
            self.filled += len(holes)
            self.split += len(outer) > 1
            for points in outer:
                values = (f"{x / record.width:.6f} {y / record.height:.6f}" for x, y in points)
                lines.append(f"{category} {' '.join(values)}\n")
        image = encode_image(record.image, self.settings.jpeg_quality)
        put_file(self.folder / "labels" / record.split / f"{record.id}.txt", "".join(lines))
        put_file(self.folder / "images" / record.split / f"{record.id}.{self.settings.suffix}", image)

    @property
    def losses(self) -> str:
        """What the format could not hold; "" for nothing."""
        if not self.filled and not self.split:
            return ""
        return f"YOLO's polygons filled {self.filled} holes and split {self.split} objects into pieces"

    def close(self) -> None:
        # Without a split of its own, validation reads the training images: YOLO's readers insist on both.
        val = "val" if (self.folder / "images" / "val").is_dir() else "train"
        train = "train" if (self.folder / "images" / "train").is_dir() else val
        names = "".join(f"  {k}: {json.dumps(name)}\n" for k, name in enumerate(self.settings.classes.names))
        put_file(self.folder / "data.yaml", f"train: images/{train}\nval: images/{val}\nnames:\n{names}")
