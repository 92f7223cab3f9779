"""What gd-infer writes unless asked for another format, and what gd-dataset reads.

images/003/003072.png           the image; a thousand samples share a folder (.jpg with --jpeg-quality)
masks/003/003072.png            palette label map: 0 background, k the k-th object of the record, 255 void
objects/003/003072_0_dog.png    one binary mask an object; these may overlap
index.html, preview/            a page to look at it
train.txt, val.txt              ids a line, where the run has a split (--val)
metadata.jsonl                  one record a line; written last, so that it is there when all is
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
    object_map,
    png,
)
from grounded_diffusion.engine.dataset.formats.tables import write_lines
from grounded_diffusion.engine.dataset.preview import write_preview
from grounded_diffusion.engine.dataset.record import SPLITS, Record, subfolder
from grounded_diffusion.engine.dataset.rows import FolderRow
from grounded_diffusion.engine.dataset.storage.base import Storage

FOLDERS = ("images", "masks", "objects")
METADATA = "metadata.jsonl"


class FolderFormat(Format):
    """See common.Format."""

    name = "folder"
    row = FolderRow

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        from PIL import Image

        row = describe(record)
        paths = file_paths(record.index, [thing.name for thing in record.objects], self.settings.suffix)
        row["image"], row["mask"], *masks = paths
        contents = [encode_image(record.image, self.settings.jpeg_quality),
                    encode_labels(object_map(record, self.settings))]  # fmt: skip
        row["objects"] = describe_objects(record)
        for thing, described, path in zip(record.objects, row["objects"], masks, strict=True):
            described["mask"] = path
            contents.append(png(Image.fromarray(thing.mask)))
        if record.split != SPLITS[0]:
            row["split"] = record.split
        return Encoded(dict(zip(paths, contents, strict=True)), row)

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        write_preview(storage, rows, dict(run))
        if "val" in run:
            lines = ((row.get("split", SPLITS[0]), row["id"]) for row in rows)
            for split in set(SPLITS) - write_lines(storage, lines, "{}.txt".format).keys():
                storage.put(f"{split}.txt", b"")
        with storage.create(METADATA) as stream:
            for row in rows:
                stream.write(to_line({name: value for name, value in row.items() if name != "split"}))


def file_paths(index: int, names: list[str], suffix: str) -> list[str]:
    """Paths of a sample's image, label map and masks."""
    stem = f"{subfolder(index)}/{index:06d}"
    masks = [f"objects/{stem}_{k}_{slug(name)}.png" for k, name in enumerate(names)]
    return [f"images/{stem}.{suffix}", f"masks/{stem}.png", *masks]


def record_files(row: dict[str, Any]) -> list[str]:
    """Paths of all files of a row."""
    return [row["image"], row["mask"], *(thing["mask"] for thing in row["objects"])]


def to_line(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def slug(name: str) -> str:
    """An object's name as part of a file name: 40 characters are at most 160 bytes."""
    return re.sub(r"[^\w-]+", "_", name)[:40].strip("_") or "object"
