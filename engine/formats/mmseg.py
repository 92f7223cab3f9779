"""The layout of MMSegmentation's custom data sets: single-channel label maps with the images' stems.

    img_dir/train/<id>.jpg, ann_dir/train/<id>.png, the same for val
    classes.txt     class k in line k, counted from 0; line 0 is the background

Values run from 0 to the number of names; 255 is ignored. Set `reduce_zero_label=False`.
"""

from __future__ import annotations

from pathlib import Path

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.formats.common import Settings, class_map, encode_image, encode_labels, put_file


class MmsegWriter:
    """See common.Writer."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings

    def put(self, record: Record) -> None:
        labels = encode_labels(class_map(record, self.settings))
        image = encode_image(record.image, self.settings.jpeg_quality)
        put_file(self.folder / "ann_dir" / record.split / f"{record.id}.png", labels)
        put_file(self.folder / "img_dir" / record.split / f"{record.id}.{self.settings.suffix}", image)

    def close(self) -> None:
        put_file(self.folder / "classes.txt", "\n".join(("background", *self.settings.classes.names)) + "\n")
