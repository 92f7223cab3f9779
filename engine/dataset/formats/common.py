"""What the formats share: the interface, class ids, encoded images and label maps."""

from __future__ import annotations

import functools
import io
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.engine.dataset.instances import by_components
from grounded_diffusion.engine.dataset.record import SPLITS, Record, told
from grounded_diffusion.engine.dataset.rows import AnyRow, Row
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.kernels import mask_epilogue

VOID = 255  # label of pixels that belong to no class and are not scored
MAX_CLASSES = 254  # labels are bytes; 0 is the background and 255 void
COMPRESSION = 3  # of PNG: half the time of the usual 6 for a few per cent more bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample in its format.

    Attributes:
        files: contents by name; `Format.pack` makes paths of them.
        row: what the shard's record keeps of the sample and `Format.finish` writes lists from; JSON-ready.
    """

    files: dict[str, bytes]
    row: dict[str, Any]


class Format(Protocol):
    """A data set format. It keeps nothing between calls, so any number of workers can share one data set.

    The same records give the same bytes.
    """

    name: str
    settings: Settings
    row: type[AnyRow] = Row  # of which it writes its lists

    @abstractmethod
    def encode(self, record: Record) -> Encoded:
        """Encode a sample. Runs in several threads at once. Raises UsageError where the format cannot hold it."""
        ...

    def pack(self, shard: int, of: int, samples: Sequence[Encoded]) -> Iterable[tuple[str, bytes]]:
        """Files of a shard by path: those of its samples as they are, unless the format has archives.

        Args:
            shard, of: the shard's number and how many there are. A conversion counts each split's shards by itself; a
                run's shards may have samples of both.
            samples: those that were accepted, in order; there may be none.
        """
        for sample in samples:
            yield from sample.files.items()

    @abstractmethod
    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Write what describes the whole data set: lists, tables, a page to look at. Memory does not grow with it.

        Args:
            rows: of all samples, in order. It is iterated several times, so not an iterator.
            run: the settings of the run, from run.json.
        """
        ...

    def losses(self, rows: Iterable[dict[str, Any]]) -> str:
        """What the format could not hold, in one line; "" for nothing."""
        return ""


@dataclass(frozen=True, slots=True)
class Classes:
    """Class names with their ids: the position, from 1, unless others are given.

    Raises:
        UsageError: two names that `key` does not tell apart.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...] = ()
    _by_key: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(1, len(self.names) + 1)))
        object.__setattr__(self, "_by_key", {key(n): k for n, k in zip(self.names, self.ids, strict=True)})
        if len(self._by_key) < len(self.names):
            raise UsageError("two class names differ only in case or spaces; give each class one in `names`", "names")

    def id(self, name: str) -> int:
        """The id of a name; case and spaces do not matter, as in VOC's "diningtable". Raises UsageError."""
        if not (found := self._by_key.get(key(name))):
            known = f"the {len(self.names)} class names"
            raise UsageError(f"the object {name!r} is not among {known}; add it to `names`", "names")
        return found

    def check(self, objects: Sequence[str], where: str) -> None:
        """Raise UsageError for an object without a class, or two objects of one class."""
        if len({self.id(name) for name in objects}) < len(objects):
            raise UsageError(f"{where} has two objects of one class; give others as `names`", "names")

    def items(self) -> list[tuple[int, str]]:
        """(id, name) of each class, in order."""
        return list(zip(self.ids, self.names, strict=True))


def key(name: str) -> str:
    """A name as it is compared."""
    return unicodedata.normalize("NFC", "".join(name.casefold().split()))


@dataclass(frozen=True, slots=True)
class Settings:
    """How to write. Part of a run's fingerprint.

    Attributes:
        classes: the class names; "folder" and "null" need none.
        jpeg_quality: 1 to 100; None writes images as PNG.
        void_border: width in pixels, on either side, of the void line between labels; 0 for none.
        void_band: pixels at which some object's probability lies between these two are void; None for none.
        polygons: COCO instances as polygons instead of RLE.
        instances: least share of the image of a connected part of a mask that is an object of its own; None has one
            object a class.

    Raises:
        UsageError: a value outside its range.
    """

    classes: Classes = Classes(())
    jpeg_quality: int | None = None
    void_border: int = 0
    void_band: tuple[float, float] | None = None
    polygons: bool = False
    instances: float | None = None

    def __post_init__(self):
        for name, low, high in (("jpeg_quality", 1, 100), ("void_border", 0, 64)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} must be from {low} to {high}, not {value}", name)
        if self.void_band and not 0 < self.void_band[0] < self.void_band[1] < 1:
            line = f"void_band takes two probabilities, the lower first, as 0.3 and 0.7, not {self.void_band}"
            raise UsageError(line, "void_band")

    def as_json(self) -> dict[str, Any]:
        """The settings as run.json has them; earlier versions had no instances, and their runs go on."""
        fields = asdict(self) | {"classes": {name: k for k, name in self.classes.items()}}
        return {name: value for name, value in fields.items() if name != "instances" or value is not None}

    @property
    def suffix(self) -> str:
        """Of image files, without the dot."""
        return "png" if self.jpeg_quality is None else "jpg"


def by_split(samples: Sequence[Encoded]) -> list[tuple[str, list[Encoded]]]:
    """The samples of each split that has any, by their rows; without any, the first split's."""
    parts = [(split, [sample for sample in samples if sample.row["split"] == split]) for split in SPLITS]
    return [(split, part) for split, part in parts if part] or [(SPLITS[0], [])]


def encode_image(image: np.ndarray, quality: int | None) -> bytes:
    """uint8 [H,W,3] as JPEG (colour at full resolution, so that edges stay under their masks), or as PNG for None."""
    from PIL import Image

    if quality is None:
        return png(Image.fromarray(image))
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", quality=quality, subsampling=0)
    return stream.getvalue()


def encode_labels(labels: np.ndarray) -> bytes:
    """uint8 [H,W] as a PNG with VOC's palette, whose indices are the labels."""
    from PIL import Image

    image = Image.fromarray(labels)
    image.putpalette(voc_palette())
    return png(image)


def png(image: Any) -> bytes:
    """A Pillow image as PNG."""
    stream = io.BytesIO()
    image.save(stream, "png", compress_level=COMPRESSION)
    return stream.getvalue()


def instances_of(record: Record, settings: Settings) -> Record:
    """The record, with an object for each connected part where the settings want that."""
    return record if settings.instances is None else by_components(record, settings.instances)


def class_map(record: Record, settings: Settings) -> np.ndarray:
    """Class ids uint8 [H,W]: 0 background, 255 void. Raises UsageError for ids that do not fit into a byte."""
    if max(settings.classes.ids, default=0) > MAX_CLASSES:
        raise UsageError(f"{len(settings.classes.names)} classes, at most {MAX_CLASSES} fit into a label map; use coco")
    ids = np.zeros(256, np.uint8)
    ids[VOID] = VOID
    for thing in record.objects:
        ids[thing.label] = settings.classes.id(thing.name)
    return ids[object_map(record, settings)]


def object_map(record: Record, settings: Settings) -> np.ndarray:
    """The record's labels uint8 [H,W], 255 where the settings want void."""
    labels = with_void(record.labels, settings.void_border)
    if settings.void_band and record.objects and record.mask_logits is not None:
        labels = np.where(unsure(record.mask_logits, labels.shape, settings.void_band), np.uint8(VOID), labels)
    return labels


def with_void(labels: np.ndarray, width: int) -> np.ndarray:
    """`labels` uint8 [H,W], 255 wherever two different ones lie within a square of side 2 * width + 1."""
    if not width:
        return labels
    from PIL import Image, ImageFilter

    image, side = Image.fromarray(labels), 2 * width + 1
    low = np.asarray(image.filter(ImageFilter.MinFilter(side)))
    high = np.asarray(image.filter(ImageFilter.MaxFilter(side)))
    return np.where(low != high, np.uint8(VOID), labels)


def unsure(mask_logits: np.ndarray, size: tuple[int, int], band: tuple[float, float]) -> np.ndarray:
    """bool [H,W]: whether some object's probability lies in the band, upsampled as the masks are.

    Args:
        mask_logits: float32 [O,h',w'].
        size: (H, W).
        band: low and high; a pixel is unsure where low < probability <= high.
    """
    valid = np.ones((1, len(mask_logits)), np.bool_)
    low, high = (mask_epilogue(mask_logits[None], valid, size, p).masks[0] for p in band)  # [O,H,W]
    return (low & ~high).any(0)


def describe(record: Record) -> dict[str, Any]:
    """What is known of a record besides its arrays: the fields that rows of every format begin with."""
    return {
        "id": record.id,
        "index": record.index,
        "prompt": record.prompt,
        "seed": record.seed,
        "draw": record.draw,
        "width": record.width,
        "height": record.height,
        "capture_timestep": float(record.capture_timestep),
    }


def describe_objects(record: Record, classes: Classes | None = None) -> list[dict[str, Any]]:
    """The objects; `label` is the class id with `classes`, and without the value in the record's label map."""
    return [
        {
            "name": thing.name,
            "label": classes.id(thing.name) if classes else thing.label,
            "area": thing.area,
            "box": list(thing.box),
            **told(thing),
        }
        for thing in record.objects
    ]


@functools.cache
def voc_palette() -> tuple[int, ...]:
    """The 256 colours of PASCAL VOC's label maps, [768]."""
    return tuple(value for k in range(256) for value in class_colour(k))


def class_colour(k: int) -> list[int]:
    """VOC's colour of a class: bits 0, 3, 6, ... of k are the top bits of red, and so on. Every k below 2**24 has its
    own, the first 256 are VOC's palette."""
    return [sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]


class NullFormat(Format):
    """Writes no sample: what a run costs without its writer, and dry runs of the machinery around it."""

    name = "null"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        return Encoded({}, {**describe(record), "objects": describe_objects(record)})

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Nothing: the shards' records say it all."""
