"""Reading a folder data set back: the layout that writer.py describes, as records whose arrays load when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grounded_diffusion.engine.writer import JOURNAL, METADATA, RUN
from grounded_diffusion.errors import UsageError

if TYPE_CHECKING:
    from grounded_diffusion.engine.pipeline import Sample

SPLITS = ("train", "val")
FIELDS = {"id": str, "index": int, "prompt": str, "seed": int, "draw": int, "width": int, "height": int,
          "capture_timestep": (int, float), "image": str, "mask": str, "objects": list}  # fmt: skip
OBJECT_FIELDS = {"name": str, "label": int, "area": int, "box": list, "score": (int, float), "mask": str}


@dataclass(frozen=True, slots=True, eq=False)
class Thing:
    """An object of a record.

    Attributes:
        name: as the prompt names it; different for every object of a record.
        label: its value in the record's label map, from 1.
        area: pixels of the mask.
        box: x, y, width, height of the mask; zeros when it is empty.
        score: mean probability inside the mask.
        read_mask: loads the mask, bool [H,W].
    """

    name: str
    label: int
    area: int
    box: tuple[int, int, int, int]
    score: float
    read_mask: Callable[[], np.ndarray]

    @property
    def mask(self) -> np.ndarray:
        """bool [H,W], read anew each time."""
        return self.read_mask()


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An image with its objects. Arrays are read anew each time, so that a data set never fills the memory.

    Attributes:
        id: file stem, unique in the data set, without dots.
        split: "train" or "val".
        read_image, read_labels: load uint8 [H,W,3], and uint8 [H,W] with 0 background and k where the object of
            label k lies on top.
    """

    id: str
    split: str
    prompt: str
    seed: int
    draw: int
    width: int
    height: int
    capture_timestep: float
    objects: tuple[Thing, ...]
    read_image: Callable[[], np.ndarray]
    read_labels: Callable[[], np.ndarray]

    @property
    def image(self) -> np.ndarray:
        return self.read_image()

    @property
    def labels(self) -> np.ndarray:
        return self.read_labels()

    @classmethod
    def from_sample(cls, sample: Sample, split: str = "train") -> Record:
        """A sample of the pipeline as a record, so that a run can write any format directly."""
        height, width = sample.labels.shape
        objects = tuple(
            Thing(name, k, sample.areas[name], sample.boxes[name], sample.scores[name], lambda n=name: sample.masks[n])
            for k, name in enumerate(sample.objects, 1)
        )
        return cls(
            f"{sample.index:06d}", split, sample.prompt, sample.seed, sample.draw, width, height,
            sample.capture_timestep, objects, lambda: sample.image, lambda: sample.labels,
        )  # fmt: skip


class FolderDataset:
    """A folder that gd-infer wrote.

    Args:
        path: the folder.
        splits: whether to read train.txt and val.txt; without them all is "train".

    Attributes:
        path: the folder.
        rows: the objects of metadata.jsonl, in order.

    Raises:
        UsageError: not such a folder, unfinished, or a line of the metadata or a split list cannot be used.
    """

    def __init__(self, path: str | Path, splits: bool = True):
        self.path = Path(path)
        self.rows = read_rows(self.path)
        self._split = read_splits(self.path, [row["id"] for row in self.rows]) if splits else {}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return map(self.record, self.rows)

    @property
    def names(self) -> list[str]:
        """Names of all objects, sorted."""
        return sorted({thing["name"] for row in self.rows for thing in row["objects"]})

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run, from run.json. Raises UsageError."""
        try:
            settings = json.loads((self.path / RUN).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            settings = None
        if not isinstance(settings, dict):
            raise UsageError(f"{self.path / RUN} is missing or damaged; restore it, or generate the data set again")
        return settings

    def record(self, row: dict[str, Any]) -> Record:
        """A row of the metadata with its arrays in reach."""
        size = row["height"], row["width"]
        objects = tuple(
            Thing(
                thing["name"], thing["label"], thing["area"], tuple(thing["box"]), thing["score"],
                lambda file=thing["mask"]: read_array(self.path / file, ("1", "L"), size) > 0,
            )
            for thing in row["objects"]
        )  # fmt: skip
        return Record(
            row["id"], self._split.get(row["id"], SPLITS[0]), row["prompt"], row["seed"], row["draw"],
            row["width"], row["height"], row["capture_timestep"], objects,
            lambda: read_array(self.path / row["image"], ("RGB",), size),
            lambda: read_array(self.path / row["mask"], ("P", "L"), size),
        )  # fmt: skip


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Checked lines of a data set's metadata."""
    file = path / METADATA
    if not file.is_file():
        if (path / JOURNAL).is_file():
            raise UsageError(f"{path} is not finished; run the same gd-infer command with --resume first")
        raise UsageError(f"{path} is not a data set of gd-infer: it has no {METADATA}")
    rows, seen = [], set()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_row(row)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}:{number}: {error}; restore the file, or generate the data set again") from None
        if row["id"] in seen:
            raise UsageError(f"{file}:{number}: the id {row['id']} occurs twice; remove one of the lines")
        seen.add(row["id"])
        rows.append(row)
    if not rows:
        raise UsageError(f"{file} is empty; there is nothing to work on")
    return rows


def check_row(row: Any) -> None:
    """Raise ValueError where a metadata line lacks a field, or a field has the wrong type."""
    check_fields(row, FIELDS, "record")
    if not row["id"] or not all(character.isalnum() or character in "-_" for character in row["id"]):
        raise ValueError(f"the id {row['id']!r} is not made of letters, digits, - and _")
    for thing in row["objects"]:
        check_fields(thing, OBJECT_FIELDS, "object")
        if len(thing["box"]) != 4 or not all(isinstance(side, int) for side in thing["box"]):
            raise ValueError(f"the box of {thing['name']!r} is not four whole numbers")
    for file in (row["image"], row["mask"], *(thing["mask"] for thing in row["objects"])):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(f"the file {file} lies outside the data set")
    if sorted(thing["label"] for thing in row["objects"]) != list(range(1, len(row["objects"]) + 1)):
        raise ValueError("the labels of the objects are not 1, 2, ...")
    if len({thing["name"] for thing in row["objects"]}) < len(row["objects"]):
        raise ValueError("an object is named twice")


def check_fields(value: Any, fields: dict[str, Any], what: str) -> None:
    """Raise ValueError unless `value` is an object with these fields of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"the {what} is not a JSON object")
    for name, kind in fields.items():
        if isinstance(value.get(name), bool) or not isinstance(value.get(name), kind):
            raise ValueError(f"the {what} has no usable field {name!r}")


def read_splits(path: Path, ids: list[str]) -> dict[str, str]:
    """id -> split from train.txt and val.txt; empty when there are no such files. Raises UsageError."""
    split: dict[str, str] = {}
    files = [path / f"{name}.txt" for name in SPLITS]
    if not any(file.exists() for file in files):
        return split
    for name, file in zip(SPLITS, files, strict=True):
        try:
            listed = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read {file}; make both lists again with gd-dataset split {path}") from None
        if twice := [id for id in listed if id in split]:
            raise UsageError(f"{file}: {twice[0]} is listed twice; run gd-dataset split {path} again")
        split.update(dict.fromkeys(listed, name))
    if missing := sorted(set(ids) ^ set(split)):
        raise UsageError(f"train.txt and val.txt do not fit the records ({missing[0]}); run gd-dataset split {path}")
    return split


def read_array(file: Path, modes: tuple[str, ...], size: tuple[int, int]) -> np.ndarray:
    """Pixels of an image file, [H,W] or [H,W,3]. Raises UsageError: missing, damaged, other mode or size."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            array, mode = np.asarray(image), image.mode
    except FileNotFoundError:
        raise UsageError(f"{file} is missing") from None
    except Exception as error:  # Pillow raises many kinds, SyntaxError and struct.error among them, for damaged files
        raise UsageError(f"{file} cannot be read: {error}") from None
    if mode not in modes:
        raise UsageError(f"{file} has mode {mode} instead of {modes[0]}")
    if array.shape[:2] != size:
        raise UsageError(f"{file} has {array.shape[1]}x{array.shape[0]} pixels instead of {size[1]}x{size[0]}")
    return array
