"""Reading a folder data set back: the layout of formats/folder.py, as records whose arrays load when asked for.

The metadata is read line by line, anew at every iteration. Of ten million samples, only the indices are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from grounded_diffusion.engine.dataset.formats.folder import METADATA
from grounded_diffusion.engine.dataset.record import SPLITS, Record, sample_id
from grounded_diffusion.engine.dataset.rows import FolderRow, read_line
from grounded_diffusion.engine.dataset.runfile import RUN, read_about
from grounded_diffusion.engine.dataset.storage.base import SHARDS, Storage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.sampling.sample import ObjectMask
from grounded_diffusion.errors import StorageError, UsageError
from grounded_diffusion.reading import Misfit


class FolderDataset:
    """A data set that gd-infer wrote in the format "folder".

    Args:
        path: the folder, or a URL such as s3://bucket/prefix.
        splits: whether to read train.txt and val.txt; without them all is "train".

    Attributes:
        storage: where it is.
        indices: int64 [n], of the samples, increasing.
        names: names of all objects, sorted.

    Raises:
        UsageError: not such a folder, unfinished, or a line of the metadata or a split list cannot be used.
    """

    def __init__(self, path: str | Path, splits: bool = True):
        self.storage = open_storage(path)
        indices, names = array("q"), set()
        for row in read_rows(self.storage):
            indices.append(row.index)
            names.update(thing.name for thing in row.objects)
        self.indices, self.names = np.frombuffer(indices, np.int64), sorted(names)
        in_val = read_splits(self.storage, self.indices) if splits else None
        self._in_val = np.zeros(len(self.indices), np.bool_) if in_val is None else in_val

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Record]:
        for row, val in zip(self.rows(), self._in_val, strict=True):
            yield self.record(row, SPLITS[int(val)])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The objects of metadata.jsonl, in order."""
        with self.storage.open(METADATA) as lines:
            yield from map(msgspec.json.decode, lines)

    def parts(self) -> list[tuple[int, Iterator[Record]]]:
        """Number and records of each split that has any."""
        in_val = int(self._in_val.sum())
        counts = dict(zip(SPLITS, (len(self) - in_val, in_val), strict=True))
        return [(count, self.part(split)) for split, count in counts.items() if count]

    def part(self, split: str) -> Iterator[Record]:
        """The records of a split."""
        return (record for record in self if record.split == split)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run, from run.json. Raises UsageError."""
        return read_settings(self.storage)

    def record(self, row: dict[str, Any], split: str = SPLITS[0]) -> Record:
        """A row of the metadata with its arrays in reach."""
        size = row["height"], row["width"]
        objects = tuple(
            ObjectMask(
                thing["name"], thing["label"], thing["area"], tuple(thing["box"]), thing["score"],
                lambda file=thing["mask"]: read_array(self.storage, file, ("1", "L"), size) > 0,
                thing.get("presence"),
            )
            for thing in row["objects"]
        )  # fmt: skip
        return Record(
            row["index"], split, row["prompt"], row["seed"], row["draw"], row["width"], row["height"],
            row["capture_timestep"], objects,
            lambda: read_array(self.storage, row["image"], ("RGB",), size),
            lambda: read_array(self.storage, row["mask"], ("P", "L"), size),
        )  # fmt: skip


def read_settings(storage: Storage) -> dict[str, Any]:
    """The settings of a run, from its run.json. Raises UsageError."""
    try:
        if about := read_about(storage):
            return about.settings
    except UsageError:
        pass
    raise UsageError(f"{storage.root}/{RUN} is missing or damaged; restore it, or generate the data set again")


def read_rows(storage: Storage) -> Iterator[FolderRow]:
    """Checked lines of a data set's metadata. Raises UsageError."""
    file, last, number = f"{storage.root}/{METADATA}", -1, 0
    if not storage.exists(METADATA):
        about = read_about(storage)
        if about and about.format != "folder":
            raise UsageError(
                f"{storage.root} has the format {about.format}, and only folder is read again; gd-infer --val makes "
                "any format with its split, gd-dataset convert any format of a folder data set"
            )
        if any(path.startswith(f"{SHARDS}/") for path in storage.walk()):
            raise UsageError(
                f"{storage.root} has no {METADATA}: either it is not finished, and the same gd-infer command finishes "
                "it, or it has another format than folder"
            )
        raise UsageError(f"{storage.root} is not a data set of gd-infer: it has no {METADATA}")
    try:
        with storage.open(METADATA) as lines:
            for line in lines:
                number += 1
                row = read_line(line)
                if row.index <= last:
                    raise Misfit(f"the id {row.id} does not come after {sample_id(last)}, the one before")
                last = row.index
                yield row
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error}") from None
    except Misfit as error:
        raise UsageError(f"{file}:{number}: {error}; restore the file, or generate the data set again") from None
    if not number:
        raise UsageError(f"{file} is empty; there is nothing to work on")


def read_splits(storage: Storage, indices: np.ndarray) -> np.ndarray | None:
    """Whether each sample is in val, bool [n], from train.txt and val.txt; None without such files. Raises UsageError.

    Args:
        indices: int64 [n], of the samples, increasing.
    """
    files = [f"{name}.txt" for name in SPLITS]
    if not any(map(storage.exists, files)):
        return None
    again = f"gd-dataset split {storage.root}"
    listed = [np.frombuffer(read_ids(storage, file, again), np.int64) for file in files]
    everything = np.sort(np.concatenate(listed))
    twice = everything[1:][everything[1:] == everything[:-1]]
    if twice.size:
        raise UsageError(f"{storage.root}/{files[1]}: {sample_id(twice[0])} is listed twice; run {again} again")
    if (wrong := np.setxor1d(everything, indices)).size:
        raise UsageError(f"train.txt and val.txt do not fit the records ({sample_id(wrong[0])}); run {again}")
    return np.isin(indices, listed[1])


def read_ids(storage: Storage, file: str, again: str) -> array:
    """Indices of the ids that a list has. Raises UsageError, which says how to make it `again`."""
    try:
        with storage.open(file) as lines:
            return array("q", (int(line) for line in lines if line.strip()))
    except (OSError, ValueError, OverflowError, StorageError):
        raise UsageError(f"cannot read {storage.root}/{file}; make both lists again with {again}") from None


def read_array(storage: Storage, path: str, modes: tuple[str, ...], size: tuple[int, int]) -> np.ndarray:
    """Pixels of an image file, [H,W] or [H,W,3]. Raises UsageError: missing, damaged, other mode or size."""
    from PIL import Image

    file = f"{storage.root}/{path}"
    try:
        with storage.open(path) as stream, Image.open(stream) as image:
            pixels, mode = np.asarray(image), image.mode
    except FileNotFoundError:
        raise UsageError(f"{file} is missing") from None
    except StorageError:
        raise
    except Exception as error:  # Pillow raises many kinds, SyntaxError and struct.error among them, for damaged files
        told = str(error).partition(" <")[0]  # without the name of the stream
        raise UsageError(f"{file} cannot be read: {told}") from None
    if mode not in modes:
        raise UsageError(f"{file} has mode {mode} instead of {modes[0]}")
    if pixels.shape[:2] != size:
        raise UsageError(f"{file} has {pixels.shape[1]}x{pixels.shape[0]} pixels instead of {size[1]}x{size[0]}")
    return pixels
