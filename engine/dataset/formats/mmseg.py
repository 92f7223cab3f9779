"""The layout of MMSegmentation's custom data sets: single-channel label maps with the images' stems.

    img_dir/train/<id>.jpg, ann_dir/train/<id>.png, the same for val
    classes.txt     class k in line k, counted from 0; line 0 is the background

Values run from 0 to the number of names; 255 is ignored. Set `reduce_zero_label=False`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    class_map,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
)
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.storage.base import Storage


class MmsegFormat(Format):
    """See common.Format."""

    name = "mmseg"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        stem = f"{record.split}/{record.id}"
        files = {
            f"ann_dir/{stem}.png": encode_labels(class_map(record, self.settings)),
            f"img_dir/{stem}.{self.settings.suffix}": encode_image(record.image, self.settings.jpeg_quality),
        }
        objects = describe_objects(record, self.settings.classes)
        return Encoded(files, {**describe(record), "split": record.split, "objects": objects})

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        names = {0: "background", **dict(self.settings.classes.items())}
        lines = [names.get(k, "") for k in range(max(names) + 1)]
        storage.put("classes.txt", "".join(f"{name}\n" for name in lines).encode())
