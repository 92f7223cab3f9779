"""Checking a data set: every file against its SHA-256, every id once, and in the format "folder" every mask against
its record."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import VOID, mask_box
from grounded_diffusion.engine.dataset.formats.folder import FOLDERS, record_files
from grounded_diffusion.engine.dataset.reader import check_row, read_array, read_splits
from grounded_diffusion.engine.dataset.record import sample_id
from grounded_diffusion.engine.dataset.runfile import RUN, read_json
from grounded_diffusion.engine.dataset.shards import FINISHED, finished_shards, read_shard
from grounded_diffusion.engine.dataset.storage.base import SHARDS, Storage, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import StorageError, UsageError

MARKER = "gd-dataset.json"  # in every converted folder: what it is, so that --overwrite removes nothing else


def verify(path: str | Path) -> Iterator[str]:
    """Problems of a data set, each in one line that names the file. Yields nothing when all is well. Raises UsageError.

    Args:
        path: what gd-infer, gd-dataset convert or gd-dataset merge wrote.
    """
    path = Path(path)
    storage = open_storage(path)
    shards = finished_shards(storage)
    if not shards:
        raise UsageError(f"{path} has no finished shard in {SHARDS}/; it is not a data set of gd-infer, or just begun")
    converted = (path / MARKER).is_file()
    if not converted and not isinstance((read_json(storage, RUN) or {}).get("settings"), dict):
        yield f"{path / RUN}: missing or damaged"
    for shard in sorted(set(range(shards[-1])) - set(shards)):
        yield f"{path / record_path(shard)}: is missing; the same gd-infer command makes the shard"
    yield from Check(path, storage, shards, converted).problems()


class Check:
    """What is kept while a data set is gone through: a number a sample, and a count a folder."""

    def __init__(self, path: Path, storage: Storage, shards: list[int], converted: bool):
        self.path, self.storage, self.shards, self.converted = path, storage, shards, converted
        self.indices = array("q")
        self.folders: Counter[str] = Counter()
        self.is_folder = False

    def problems(self) -> Iterator[str]:
        with ThreadPoolExecutor(os.cpu_count(), "verify") as pool:
            for shard in list(self.shards):
                try:
                    record = read_shard(self.storage, shard)
                except StorageError as error:
                    yield str(error)
                    self.shards.remove(shard)
                    continue
                yield from self.check_counts(record)
                yield from chain.from_iterable(pool.map(self.check_file, record["files"].items()))
                rows = [row for row in record["rows"] if "image" in row]  # those of the format "folder"
                yield from chain.from_iterable(pool.map(self.check_row, rows, repeat(record)))
                self.is_folder |= bool(rows)
        yield from self.check_finish()
        yield from self.check_ids()
        yield from self.check_foreign()

    def check_counts(self, record: dict[str, Any]) -> Iterator[str]:
        """That a shard's samples are all accounted for."""
        name, rows = self.path / record_path(record["shard"]), record["rows"]
        self.indices.extend(row["index"] for row in rows)
        self.folders.update(folder_of(file) for file in record["files"])
        others = [*record["rejected"], *record["quarantined"]]
        if not self.converted:
            first = record["first"]
            if sorted(one["index"] for one in [*rows, *others]) != list(range(first, first + record["samples"])):
                yield f"{name}: its samples are not {first} to {first + record['samples'] - 1}, each once"

    def check_file(self, item: tuple[str, str]) -> list[str]:
        """That a file is what was written."""
        file, digest = self.path / item[0], item[1]
        try:
            with file.open("rb") as stream:
                same = hashlib.file_digest(stream, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return [f"{file} is missing"]
        except OSError as error:
            return [f"{file}: cannot be read: {error.strerror or error}"]
        return [] if same else [f"{file}: has changed since it was written (SHA-256 differs)"]

    def check_row(self, row: dict[str, Any], record: dict[str, Any]) -> list[str]:
        """That a row of the format "folder" fits its files."""
        name = self.path / record_path(record["shard"])
        try:
            check_row(row)
        except ValueError as error:
            return [f"{name}: {error}"]
        unknown = [f"{name}: has no SHA-256 of {file}" for file in record_files(row) if file not in record["files"]]
        return unknown or list(check_arrays(self.path, row))

    def check_finish(self) -> Iterator[str]:
        """Lists and tables of the whole data set."""
        try:
            files = json.loads(self.storage.read(FINISHED))["files"].items()
        except FileNotFoundError:
            yield f"{self.path / FINISHED}: is missing; the run is not finished, and the same gd-infer command does it"
        except (ValueError, TypeError, KeyError, AttributeError):
            yield f"{self.path / FINISHED}: is damaged"
        else:
            yield from chain.from_iterable(map(self.check_file, files))

    def check_ids(self) -> Iterator[str]:
        """That every id occurs once, in the records and in the lists of the splits."""
        indices = np.sort(np.frombuffer(self.indices, np.int64))
        for index in np.unique(indices[1:][indices[1:] == indices[:-1]]).tolist():
            yield f"{self.path / SHARDS}: the id {sample_id(index)} occurs more than once"
        if not self.converted:
            try:
                read_splits(self.path, np.unique(indices))
            except UsageError as error:
                yield str(error)

    def check_foreign(self) -> Iterator[str]:
        """That the samples' folders hold nothing else. The files' names are only gathered where a count differs."""
        folders = set(self.folders) - {""}
        if self.is_folder:
            for top in FOLDERS:
                folders |= {os.path.relpath(found, self.path) for found, _, _ in os.walk(self.path / top)}
        for folder in sorted(folders):
            if count_files(self.path / folder) <= self.folders[folder]:
                continue
            known = {
                file.rpartition("/")[2]
                for shard in self.shards
                for file in read_shard(self.storage, shard)["files"]
                if folder_of(file) == folder
            }
            for name in sorted(set(self.storage.list(folder)) - known):
                yield f"{self.path / folder / name}: belongs to no record"


def count_files(folder: Path) -> int:
    """Number of files directly under a folder."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.is_file() for entry in entries)
    except OSError:  # its files have been told as missing
        return 0


def folder_of(file: str) -> str:
    """The folder of a path; "" for none."""
    return file.rpartition("/")[0]


def check_arrays(path: Path, row: dict[str, Any]) -> Iterator[str]:
    """A record's areas, boxes and label map against its masks."""
    size = row["height"], row["width"]
    arrays: dict[str, np.ndarray] = {}
    expected = {row["image"]: ("RGB",), row["mask"]: ("P", "L"), **{o["mask"]: ("1", "L") for o in row["objects"]}}
    for file, modes in expected.items():
        try:
            if (path / file).exists():  # a missing one has been told
                arrays[file] = read_array(path / file, modes, size)
        except UsageError as error:
            yield str(error)
    labels, union = arrays.get(row["mask"]), np.zeros(size, np.bool_)
    for thing in row["objects"]:
        if thing["mask"] not in arrays:
            labels = None
            continue
        file, mask = path / thing["mask"], arrays[thing["mask"]] > 0
        union |= mask
        if int(mask.sum()) != thing["area"]:
            yield f"{file}: {int(mask.sum())} pixels, the record of {row['id']} says {thing['area']}"
        if mask_box(mask) != thing["box"]:
            yield f"{file}: its box is {mask_box(mask)}, the record of {row['id']} says {thing['box']}"
        if labels is not None and (stray := int((~mask & (labels == thing["label"])).sum())):
            yield f"{path / row['mask']}: {stray} pixels of {thing['name']!r} lie outside {thing['mask']}"
    if labels is None:
        return
    highest = int(labels[labels != VOID].max(initial=0))
    if highest > len(row["objects"]):
        yield f"{path / row['mask']}: has the label {highest}, the record has {len(row['objects'])} objects"
    if lost := int((union & (labels == 0)).sum()):
        yield f"{path / row['mask']}: {lost} pixels of the objects' masks are background"
