"""PASCAL VOC 2012's layout.

    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/SegmentationClass/<id>.png     palette, class ids; 0 background, 255 void
    VOCdevkit/VOC2012/SegmentationObject/<id>.png    palette, 1, 2, ... by object
    VOCdevkit/VOC2012/ImageSets/Segmentation/        train.txt, val.txt, trainval.txt with one id a line
    VOCdevkit/VOC2012/labelmap.txt                   name:R,G,B:: of every class

One mask covers all of a kind, so an "object" is all of a class that the image shows.
"""

from __future__ import annotations

from pathlib import Path

from grounded_diffusion.engine.dataset import SPLITS, Record
from grounded_diffusion.engine.formats.common import (
    Settings,
    class_map,
    encode_image,
    encode_labels,
    put_file,
    with_void,
)
from grounded_diffusion.engine.writer import voc_palette


class VocWriter:
    """See common.Writer."""

    def __init__(self, folder: Path, settings: Settings):
        self.root, self.settings = folder / "VOCdevkit" / "VOC2012", settings
        self.ids: dict[str, list[str]] = {split: [] for split in SPLITS}

    def put(self, record: Record) -> None:
        classes, labels = class_map(record, self.settings), record.labels
        objects = with_void(labels, labels, self.settings.void_border)
        image = encode_image(record.image, self.settings.jpeg_quality)
        put_file(self.root / "JPEGImages" / f"{record.id}.jpg", image)
        put_file(self.root / "SegmentationClass" / f"{record.id}.png", encode_labels(classes))
        put_file(self.root / "SegmentationObject" / f"{record.id}.png", encode_labels(objects))
        self.ids[record.split].append(record.id)

    def close(self) -> None:
        lists = {**self.ids, "trainval": sorted(id for ids in self.ids.values() for id in ids)}
        for name, ids in lists.items():
            put_file(self.root / "ImageSets" / "Segmentation" / f"{name}.txt", "".join(f"{id}\n" for id in ids))
        palette = voc_palette()
        lines = ["# label:color_rgb:parts:actions"]
        for k, name in enumerate(("background", *self.settings.classes.names)):
            lines.append(f"{name}:{','.join(map(str, palette[3 * k : 3 * k + 3]))}::")
        put_file(self.root / "labelmap.txt", "\n".join(lines) + "\n")
