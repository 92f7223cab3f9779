"""What the formats share: the writer interface, class ids, encoded images and label maps, and a folder that appears
whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.writer import COMPRESSION, readable_errors, voc_palette
from grounded_diffusion.errors import UsageError

MARKER = "gd-dataset.json"  # in every converted folder: what it is, so that --overwrite removes nothing else
VOID = 255  # label of pixels that belong to no class and are not scored
MAX_CLASSES = 254  # labels are bytes; 0 is the background and 255 void


class Writer(Protocol):
    """Where records go. What a writer has made is complete only after `close`."""

    def put(self, record: Record) -> None:
        """Write a record. Raises UsageError where the format cannot hold it."""
        ...

    def close(self) -> None:
        """Write lists and tables; returns when everything is in place."""
        ...


@dataclass(frozen=True, slots=True)
class Classes:
    """Class names; the id of a class is its position, from 1."""

    names: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_ids", {key(name): k for k, name in enumerate(self.names, 1)})
        if len(self._ids) < len(self.names):
            raise UsageError("two class names differ only in case or spaces; give each class one name with --names")

    def id(self, name: str) -> int:
        """The id of a name; case and spaces do not matter, as in VOC's "diningtable". Raises UsageError."""
        if not (found := self._ids.get(key(name))):
            raise UsageError(f"the object {name!r} is not among the {len(self.names)} class names; add it to --names")
        return found


def key(name: str) -> str:
    """A name as it is compared."""
    return "".join(name.casefold().split())


@dataclass(frozen=True, slots=True)
class Settings:
    """How to write.

    Attributes:
        classes: the class names.
        jpeg_quality: 1 to 100; None writes images as PNG.
        void_border: width in pixels, on either side, of the void line between labels; 0 for none.
        polygons: COCO instances as polygons instead of RLE.
        shard_size: samples in a tar or Parquet file.
    """

    classes: Classes
    jpeg_quality: int | None = 95
    void_border: int = 0
    polygons: bool = False
    shard_size: int = 1000

    def __post_init__(self):
        for name, low, high in (("jpeg_quality", 1, 100), ("void_border", 0, 64), ("shard_size", 1, 1_000_000)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")

    @property
    def suffix(self) -> str:
        """Of image files, without the dot."""
        return "png" if self.jpeg_quality is None else "jpg"


def encode_image(image: np.ndarray, quality: int | None) -> bytes:
    """uint8 [H,W,3] as JPEG (colour at full resolution, so that edges stay under their masks), or as PNG for None."""
    from PIL import Image

    stream = io.BytesIO()
    if quality is None:
        Image.fromarray(image).save(stream, "png", compress_level=COMPRESSION)
    else:
        Image.fromarray(image).save(stream, "jpeg", quality=quality, subsampling=0)
    return stream.getvalue()


def encode_labels(labels: np.ndarray) -> bytes:
    """uint8 [H,W] as a PNG with VOC's palette, whose indices are the labels."""
    from PIL import Image

    image, stream = Image.fromarray(labels), io.BytesIO()
    image.putpalette(voc_palette())
    image.save(stream, "png", compress_level=COMPRESSION)
    return stream.getvalue()


def class_map(record: Record, settings: Settings) -> np.ndarray:
    """Class ids uint8 [H,W]: 0 background, 255 void. Raises UsageError for more classes than fit into a byte."""
    if len(settings.classes.names) > MAX_CLASSES:
        raise UsageError(f"{len(settings.classes.names)} classes, at most {MAX_CLASSES} fit into a label map; use coco")
    ids = np.zeros(256, np.uint8)
    for thing in record.objects:
        ids[thing.label] = settings.classes.id(thing.name)
    labels = record.labels
    return with_void(ids[labels], labels, settings.void_border)


def with_void(ids: np.ndarray, labels: np.ndarray, width: int) -> np.ndarray:
    """`ids` uint8 [H,W] with 255 wherever two different `labels` lie within a square of side 2 * width + 1."""
    if not width:
        return ids
    from PIL import Image, ImageFilter

    image, side = Image.fromarray(labels), 2 * width + 1
    low = np.asarray(image.filter(ImageFilter.MinFilter(side)))
    high = np.asarray(image.filter(ImageFilter.MaxFilter(side)))
    return np.where(low != high, np.uint8(VOID), ids)


def mask_box(mask: np.ndarray) -> list[int]:
    """x, y, width, height of a bool mask [H,W]; zeros when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def describe(record: Record) -> dict[str, Any]:
    """What is known of a record besides its arrays, as JSON takes it."""
    return {
        "id": record.id,
        "prompt": record.prompt,
        "seed": record.seed,
        "draw": record.draw,
        "width": record.width,
        "height": record.height,
        "capture_timestep": record.capture_timestep,
    }


def describe_objects(record: Record, classes: Classes) -> list[dict[str, Any]]:
    """The objects with their class ids, which are the values in the class map."""
    return [
        {"name": o.name, "label": classes.id(o.name), "area": o.area, "box": list(o.box), "score": float(o.score)}
        for o in record.objects
    ]


def put_file(path: Path, content: bytes | str) -> None:
    """Write a file, with its folders. Raises UsageError."""
    with readable_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def fresh_folder(out: Path, overwrite: bool, is_ours: str = MARKER) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well and is removed when it does not.

    Args:
        overwrite: replace a folder that is not empty, if it has a file `is_ours`.

    Raises:
        UsageError: `out` is a file, not empty, not ours, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / is_ours).is_file():
            raise UsageError(f"{out} is not empty and was not written by this command; choose another --out")
        if not overwrite:
            raise UsageError(f"{out} is not empty; --overwrite replaces it")
    with readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            folder = temporary / "new"
            folder.mkdir()
            yield folder
            if out.is_dir():
                out.rename(temporary / "old")
            folder.rename(out)
        finally:
            if not out.exists() and (temporary / "old").exists():
                (temporary / "old").rename(out)
            shutil.rmtree(temporary, ignore_errors=True)


def write_marker(folder: Path, format: str, settings: Settings, samples: int) -> None:
    """Write the marker file; it is also where the class ids of every format can be looked up."""
    content = {"format": format, "samples": samples, "classes": list(settings.classes.names),
               "jpeg_quality": settings.jpeg_quality, "void_border": settings.void_border}  # fmt: skip
    put_file(folder / MARKER, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
