"""Checking a data set: every file against its SHA-256, every id once, and in the format "folder" every mask against
its record."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import VOID
from grounded_diffusion.engine.dataset.formats.folder import FOLDERS, record_files
from grounded_diffusion.engine.dataset.instances import mask_box
from grounded_diffusion.engine.dataset.reader import read_array, read_splits
from grounded_diffusion.engine.dataset.record import sample_id
from grounded_diffusion.engine.dataset.rows import FolderRow
from grounded_diffusion.engine.dataset.runfile import CONVERT, INFER, MARKER, RUN, SUMMARY, About, read_about
from grounded_diffusion.engine.dataset.shards import (
    DamagedShard,
    digest_of,
    finished_shards,
    read_finished,
    read_shard,
)
from grounded_diffusion.engine.dataset.storage.base import FINISHED, SHARDS, Storage, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import StorageError, UsageError
from grounded_diffusion.reading import Misfit, as_type

ODD = (TypeError, ValueError, KeyError, AttributeError, OverflowError)  # what a damaged record may lead to


def verify(path: str | Path) -> Iterator[str]:
    """Problems of a data set, each in one line that names the file. Yields nothing when all is well. Raises UsageError.

    Args:
        path: folder or URL of what gd-infer, gd-dataset convert or gd-dataset merge wrote.
    """
    storage = open_storage(path)
    shards = finished_shards(storage)
    if not shards:
        raise UsageError(f"{path} has no finished shard in {SHARDS}/; it is not a data set of gd-infer, or just begun")
    about = None
    with contextlib.suppress(UsageError):
        about = read_about(storage)
    if not about:
        yield f"{storage.root}/{RUN}: missing or damaged"
    yield from Check(storage, shards, about).problems()


def total_shards(about: About | None, shards: list[int]) -> int:
    """How many shards a data set must have, as far as its settings tell."""
    samples, size = (about.settings.get(key) for key in ("samples", "shard_size")) if about else (0, 0)
    planned = -(-samples // size) if isinstance(samples, int) and isinstance(size, int) and size > 0 else 0
    return max(planned, shards[-1] + 1)


class Check:
    """What is kept while a data set is gone through: a number a sample, and a count a folder."""

    def __init__(self, storage: Storage, shards: list[int], about: About | None):
        self.storage, self.shards, self.about = storage, shards, about
        self.converted = about.made_by == CONVERT if about else storage.exists(MARKER)
        self.indices = array("q")
        self.folders: Counter[str] = Counter()
        self.is_folder = False

    def file(self, path: str) -> str:
        """A file's name in messages."""
        return f"{self.storage.root}/{path}"

    def problems(self) -> Iterator[str]:
        with ThreadPoolExecutor(os.cpu_count(), "verify") as pool:
            yield from self.check_finish(pool)
            for shard in list(self.shards):
                try:
                    yield from self.check_shard(pool, read_shard(self.storage, shard))
                except (StorageError, *ODD) as error:
                    told = isinstance(error, DamagedShard)
                    yield str(error) if told else f"{self.file(record_path(shard))}: is damaged: {error}"
                    self.shards.remove(shard)
        yield from self.check_ids()
        yield from self.check_foreign()

    def check_shard(self, pool: ThreadPoolExecutor, record: dict[str, Any]) -> Iterator[str]:
        """A shard's record, its files, and in the format "folder" what the one says of the others."""
        yield from self.check_counts(record)
        yield from chain.from_iterable(pool.map(self.check_file, record["files"].items()))
        known = self.about.format == "folder" if self.about else None
        rows = [row for row in record["rows"] if ("image" in row and "mask" in row if known is None else known)]
        yield from chain.from_iterable(pool.map(self.check_row, rows, repeat(record)))
        self.is_folder |= bool(rows)

    def check_counts(self, record: dict[str, Any]) -> Iterator[str]:
        """That a shard's samples are all accounted for."""
        rows = record["rows"]
        self.indices.extend(row["index"] for row in rows)
        self.folders.update(folder_of(file) for file in record["files"])
        others = [*record["rejected"], *record["quarantined"]]
        if not self.converted:
            first, count = record["first"], record["samples"]
            if sorted(one["index"] for one in [*rows, *others]) != list(range(first, first + count)):
                name = self.file(record_path(record["shard"]))
                yield f"{name}: its samples are not {first} to {first + count - 1}, each once"

    def check_file(self, item: tuple[str, str]) -> list[str]:
        """That a file is what was written."""
        path, digest = item
        try:
            same = digest_of(self.storage, path) == digest
        except FileNotFoundError:
            return [f"{self.file(path)} is missing"]
        except (OSError, ValueError, StorageError) as error:
            return [f"{self.file(path)}: {error}"]
        return [] if same else [f"{self.file(path)}: has changed since it was written (SHA-256 differs)"]

    def check_row(self, row: dict[str, Any], record: dict[str, Any]) -> list[str]:
        """That a row of the format "folder" fits its files."""
        name = self.file(record_path(record["shard"]))
        try:
            as_type(row, FolderRow)
        except Misfit as error:
            return [f"{name}: {error} (sample {sample_id(row['index'])})"]
        unknown = [f"{name}: has no SHA-256 of {file}" for file in record_files(row) if file not in record["files"]]
        return unknown or list(check_arrays(self.storage, row))

    def check_finish(self, pool: ThreadPoolExecutor) -> Iterator[str]:
        """All that no shard's record names: lists, tables, settings, and the records themselves."""
        noted: dict[str, dict[str, str]] = {"files": {}}
        try:
            noted = read_finished(self.storage)
            yield from self.check_noted(noted["files"].keys() | noted.get("added", {}).keys())
        except FileNotFoundError:
            yield f"{self.file(FINISHED)}: is missing; the run is not finished, and the same gd-infer command does it"
        except DamagedShard as error:
            yield str(error)
        own, there = noted["files"], set(map(record_path, self.shards))
        planned = set(map(record_path, range(total_shards(self.about, self.shards))))
        for path in sorted((planned | set(filter(is_record, own))) - there):
            yield f"{self.file(path)}: is missing; the same gd-infer command makes the shard"
        others = {path: digest for path, digest in own.items() if path in there or not is_record(path)}
        yield from chain.from_iterable(pool.map(self.check_file, (others | noted.get("added", {})).items()))

    def check_noted(self, noted: set[str]) -> Iterator[str]:
        """That shards/finish.json knows all that it has to."""
        needed = {MARKER if self.converted else RUN, *map(record_path, self.shards)}
        if self.about and self.about.made_by == INFER and "samples" in self.about.settings:
            needed.add(SUMMARY)
        if not needed <= noted:
            again = "gd-dataset convert" if self.converted else "gd-infer"
            yield (
                f"{self.file(FINISHED)}: lacks the SHA-256 of run.json or of records, as those of earlier versions do; "
                f"the same {again} command adds them"
            )

    def check_ids(self) -> Iterator[str]:
        """That every id occurs once, in the records and in the lists of the splits."""
        indices = np.sort(np.frombuffer(self.indices, np.int64))
        for index in np.unique(indices[1:][indices[1:] == indices[:-1]]).tolist():
            yield f"{self.file(SHARDS)}: the id {sample_id(index)} occurs more than once"
        if not self.converted:
            try:
                read_splits(self.storage, np.unique(indices))
            except (UsageError, StorageError) as error:
                yield str(error)

    def check_foreign(self) -> Iterator[str]:
        """That the samples' folders hold nothing else. The files' names are only gathered where a count differs."""
        there = Counter(folder_of(path) for path in self.storage.walk() if not path.endswith("/"))
        tops = tuple(f"{top}/" for top in FOLDERS) if self.is_folder else ()
        for folder in sorted(there):
            if not folder or (folder not in self.folders and not f"{folder}/".startswith(tops)):
                continue
            if there[folder] <= self.folders[folder]:
                continue
            known = {
                file.rpartition("/")[2]
                for shard in self.shards
                for file in read_shard(self.storage, shard)["files"]
                if folder_of(file) == folder
            }
            for name in sorted(set(self.storage.list(folder)) - known):
                yield f"{self.file(folder)}/{name}: belongs to no record"


def is_record(path: str) -> bool:
    """Whether a path is that of a shard's record."""
    return path.startswith(f"{SHARDS}/") and path != FINISHED


def folder_of(file: str) -> str:
    """The folder of a path; "" for none."""
    return file.rpartition("/")[0]


def check_arrays(storage: Storage, row: dict[str, Any]) -> Iterator[str]:
    """A record's areas, boxes and label map against its masks."""
    size = row["height"], row["width"]
    arrays: dict[str, np.ndarray] = {}
    path = storage.root
    expected = {row["image"]: ("RGB",), row["mask"]: ("P", "L"), **{o["mask"]: ("1", "L") for o in row["objects"]}}
    for file, modes in expected.items():
        try:
            if storage.exists(file):  # a missing one has been told
                arrays[file] = read_array(storage, file, modes, size)
        except (UsageError, StorageError) as error:
            yield str(error)
    labels, union = arrays.get(row["mask"]), np.zeros(size, np.bool_)
    for thing in row["objects"]:
        if thing["mask"] not in arrays:
            labels = None
            continue
        file, mask = f"{path}/{thing['mask']}", arrays[thing["mask"]] > 0
        union |= mask
        if int(mask.sum()) != thing["area"]:
            yield f"{file}: {int(mask.sum())} pixels, the record of {row['id']} says {thing['area']}"
        if mask_box(mask) != thing["box"]:
            yield f"{file}: its box is {mask_box(mask)}, the record of {row['id']} says {thing['box']}"
        if labels is not None and (stray := int((~mask & (labels == thing["label"])).sum())):
            yield f"{path}/{row['mask']}: {stray} pixels of {thing['name']!r} lie outside {thing['mask']}"
    if labels is None:
        return
    highest = int(labels[labels != VOID].max(initial=0))
    if highest > len(row["objects"]):
        yield f"{path}/{row['mask']}: has the label {highest}, the record has {len(row['objects'])} objects"
    if lost := int((union & (labels == 0)).sum()):
        yield f"{path}/{row['mask']}: {lost} pixels of the objects' masks are background"
