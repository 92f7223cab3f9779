"""What is written of samples, as types: the lines of metadata.jsonl, and the records of shards. See `reading`."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from msgspec import UNSET, Struct, UnsetType

from grounded_diffusion.engine.dataset.record import sample_id
from grounded_diffusion.reading import Count, Lines, Number, Share


class AnyRow(Struct):
    """A sample of any format, as far as a shard's record is about it."""

    index: Number


class Lost(AnyRow):
    """A sample that is not part of the data set."""

    reason: str
    attempts: Number = 0


class Thing(Struct):
    """An object of a sample."""

    name: str
    label: Number


class Measured(Thing):
    """An object with its mask's measures."""

    area: Number
    box: tuple[int, int, int, int]
    score: Share
    presence: Share | UnsetType = UNSET


class Described(AnyRow, kw_only=True):
    """A sample without its objects: what `formats.common.describe` tells of it."""

    id: str
    prompt: str
    seed: Number
    draw: Number
    width: Count
    height: Count
    capture_timestep: float
    split: Literal["train", "val"] = "train"

    def __post_init__(self) -> None:
        if self.id != sample_id(self.index):
            raise ValueError(f"the id {self.id!r} does not belong to index {self.index}")


class Row(Described, kw_only=True):
    """A sample of a format that has nothing else to say of its objects."""

    objects: list[Measured]


class FolderThing(Measured, kw_only=True):
    """An object with a mask of its own."""

    mask: str


class FolderRow(Described, kw_only=True):
    """A sample of the format "folder"."""

    image: str
    mask: str
    objects: list[FolderThing]

    def __post_init__(self) -> None:
        Described.__post_init__(self)
        for file in (self.image, self.mask, *[thing.mask for thing in self.objects]):
            if file.startswith("/") or ".." in file.split("/"):
                raise ValueError(f"the file {file} lies outside the data set")
        if sorted([thing.label for thing in self.objects]) != list(range(1, len(self.objects) + 1)):
            raise ValueError("the labels of the objects are not 1, 2, ...")
        if len({thing.name for thing in self.objects}) < len(self.objects):
            raise ValueError("an object is named twice")


class ExamplesRow(Described, kw_only=True):
    """A sample of the format "examples", whose masks a detector makes."""

    image: str
    objects: list[Thing]


class CocoThing(Measured):
    """An object with polygons or run lengths, unless its mask is empty."""

    segmentation: list[Any] | dict[str, Any] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.area and self.segmentation is UNSET:
            raise ValueError(f"the object {self.name!r} has no segmentation")


class CocoRow(Described, kw_only=True):
    """A sample of the format "coco"."""

    objects: list[CocoThing]


class OutlinedThing(Measured, kw_only=True):
    """An object, and what its outlines leave out."""

    pieces: Number
    holes: Number


class OutlinedRow(Described, kw_only=True):
    """A sample of the format "yolo-seg"."""

    objects: list[OutlinedThing]


R = TypeVar("R", bound=AnyRow)


class Head(Struct):
    """A shard's record without its files and rows, which are most of it."""

    samples: Number
    accepted: Number
    rejected: list[Lost]
    quarantined: list[Lost]


class ShardRecord(Head, Generic[R], kw_only=True):
    """The record of a shard, whose rows are those of a format."""

    shard: Number
    first: Number
    files: dict[str, str]
    rows: list[R]


def metadata_colons(row: FolderRow) -> int:
    """How many colons a line has that says this and nothing twice: one a field, and those in its texts."""
    count = 11 + row.prompt.count(":") + row.id.count(":") + row.image.count(":") + row.mask.count(":")
    for thing in row.objects:
        count += 6 + (thing.presence is not UNSET) + thing.name.count(":") + thing.mask.count(":")
    return count


read_line = Lines(FolderRow, metadata_colons)  # of metadata.jsonl
