"""Joining data sets into one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import Encoded, Settings
from grounded_diffusion.engine.dataset.formats.folder import FolderFormat, file_paths, record_files
from grounded_diffusion.engine.dataset.ours import folder_files
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import sample_id
from grounded_diffusion.engine.dataset.runfile import MERGE
from grounded_diffusion.engine.dataset.shards import digest_of, write_dataset
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.verify import verify
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import fresh_folder

MERGED_SHARD = 1000  # samples in a shard of a merged data set


def merge(sources: list[str], out: Path, overwrite: bool = False) -> int:
    """Join folder data sets into a new one, numbering the samples anew; returns how many there are.

    Raises:
        UsageError: a source has a problem, an image occurs twice, or `out` cannot be written.
    """
    sets = [FolderDataset(source) for source in sources]
    for data in sets:
        for problem in islice(verify(data.storage.root), 1):
            root = data.storage.root
            raise UsageError(f"{problem}; gd-dataset verify {root} lists all problems; repair them before merging")
    check_different(sets)
    count, run = sum(map(len, sets)), {"merged": [data.settings for data in sets]}
    everything = ((data.storage, row) for data in sets for row in data.rows())
    items = ((storage, row, index) for index, (storage, row) in enumerate(everything))
    with fresh_folder(out, overwrite, functools.partial(folder_files, command=MERGE)) as folder:
        format = FolderFormat(Settings())
        write_dataset(LocalStorage(folder), format, [(count, items)], lambda item: copy(*item), MERGED_SHARD, run)
    return count


def copy(source: Storage, row: dict[str, Any], index: int) -> Encoded:
    """A sample with the files that it has, under the names of sample `index`."""
    old = record_files(row)
    new = file_paths(index, [thing["name"] for thing in row["objects"]], row["image"].rpartition(".")[2])
    files = {path: source.read(file) for path, file in zip(new, old, strict=True)}
    objects = [{**thing, "mask": path} for thing, path in zip(row["objects"], new[2:], strict=True)]
    return Encoded(files, {**row, "id": sample_id(index), "index": index, "image": new[0], "mask": new[1],
                           "objects": objects})  # fmt: skip


def check_different(sets: list[FolderDataset]) -> None:
    """Raise UsageError where an image occurs twice. Of each image, sixteen bytes are kept."""
    digests = bytearray()
    for _, digest in image_digests(sets):
        digests += digest
    values, counts = np.unique(np.frombuffer(digests, "V16"), return_counts=True)
    twice = {value.tobytes() for value in values[counts > 1]}
    places: dict[bytes, str] = {}
    for image, digest in image_digests(sets) if twice else ():
        if digest in places:
            raise UsageError(f"{image} is the same picture as {places[digest]}; a merged data set has each once")
        if digest in twice:
            places[digest] = image


def image_digests(sets: list[FolderDataset]) -> Iterator[tuple[str, bytes]]:
    """(file, 16 bytes of its SHA-256) of every image."""
    for data in sets:
        for row in data.rows():
            digest = digest_of(data.storage, row["image"])
            yield f"{data.storage.root}/{row['image']}", bytes.fromhex(digest)[:16]
