"""Records of finished shards: what a data set is made of while it grows, and what it is checked against afterwards.

    shards/000012.json
    {"shard": 12, "first": 3072, "samples": 256, "accepted": 250,
     "rejected": [{"index", "reason", "attempts"}], "quarantined": [...],
     "files": {path: SHA-256}, "rows": [of each accepted sample, in order]}

    shards/finish.json
    {"files": {path: SHA-256}}          lists and tables of the whole data set

accepted + rejected + quarantined = samples. There are no times, hosts or processes in a record, so that it does not
show how often a run was interrupted, or how many workers it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, BinaryIO, TypeVar, cast

from grounded_diffusion.engine.dataset.formats.common import Encoded, Format
from grounded_diffusion.engine.dataset.preview import is_preview
from grounded_diffusion.engine.dataset.storage.base import SHARDS, Storage, record_path
from grounded_diffusion.errors import StorageError

Item = TypeVar("Item")
FINISHED = f"{SHARDS}/finish.json"
FIELDS = {"shard": int, "first": int, "samples": int, "accepted": int, "rejected": list, "quarantined": list,
          "files": dict, "rows": list}  # fmt: skip


class DamagedShard(StorageError):  # noqa: N818 - a state, not a failure
    """The record of a shard cannot be used; the shard is to be made again."""


def encode_shard(
    shard: int,
    first: int,
    rows: Sequence[Mapping[str, Any]],
    files: Iterable[tuple[str, bytes]],
    rejected: Sequence[Mapping[str, Any]] = (),
    quarantined: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The record of a shard. `first` is the index of its first sample; each of the others is in one of the lists."""
    record = {
        "shard": shard,
        "first": first,
        "samples": len(rows) + len(rejected) + len(quarantined),
        "accepted": len(rows),
        "rejected": list(rejected),
        "quarantined": list(quarantined),
        "files": {path: hashlib.sha256(content).hexdigest() for path, content in files},
        "rows": list(rows),
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_shard(storage: Storage, shard: int, samples: range | None = None) -> dict[str, Any]:
    """The record of a shard, which must be about these samples. Raises DamagedShard, or FileNotFoundError."""
    path = record_path(shard)
    try:
        record = json.loads(storage.read(path))
        good = all(isinstance(record[name], kind) for name, kind in FIELDS.items()) and record["shard"] == shard
        indices = [entry["index"] for name in ("rows", "rejected", "quarantined") for entry in record[name]]
        good = good and record["accepted"] == len(record["rows"]) and record["samples"] == len(indices)
        good = good and (samples is None or sorted(indices) == list(samples))
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise DamagedShard(f"{storage.root}/{path} is damaged; remove it, and the same command makes the shard again")
    return record


def finished_shards(storage: Storage) -> list[int]:
    """Numbers of the shards that have a record, in order."""
    names = [name.removesuffix(".json") for name in storage.list(SHARDS) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isdecimal())


class Rows:
    """The rows of shards, in order, read anew at every iteration: one shard is in memory at a time."""

    def __init__(self, storage: Storage, shards: Sequence[int]):
        self.storage, self.shards = storage, shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.shards:
            yield from read_shard(self.storage, shard)["rows"]


class Recording:
    """A storage that notes the SHA-256 of what is written through it, in `files`."""

    def __init__(self, storage: Storage):
        self.storage, self.files = storage, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def put(self, path: str, content: bytes) -> None:
        self.storage.put(path, content)
        self.files[path] = hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Hashing]:
        with self.storage.create(path) as stream:
            yield (hashing := Hashing(stream))
        self.files[path] = hashing.digest.hexdigest()


class Hashing:
    """A stream that hashes what is written to it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.stream.write(content)


def finish_shards(storage: Storage, format: Format, shards: Sequence[int], run: Mapping[str, Any]) -> str:
    """Write what describes the whole data set, and note it in shards/finish.json. Returns what the format could not
    hold, "" for nothing.

    The page to look at is not noted: it may be made anew.
    """
    recording, rows = Recording(storage), Rows(storage, shards)
    format.finish(cast(Storage, recording), rows, run)  # what it does not have itself it asks of the storage
    files = {path: recording.files[path] for path in sorted(recording.files) if not is_preview(path)}
    storage.put(FINISHED, json.dumps({"files": files}, ensure_ascii=False, indent=1).encode() + b"\n")
    return format.losses(rows)


def write_shards(
    storage: Storage,
    format: Format,
    parts: Iterable[tuple[int, Iterable[Item]]],
    encode: Callable[[Item], Encoded],
    shard_size: int,
    run: Mapping[str, Any],
) -> str:
    """Write a whole data set from what is there already. Returns what the format could not hold.

    Args:
        parts: number of samples and the samples, of each split that has any.
        encode: makes files and row of a sample; called from several threads.
        run: what `Format.finish` is told of the run.
    """
    shard = written = 0
    with ThreadPoolExecutor(os.cpu_count(), "encode") as pool:
        for count, items in parts:
            items, of = iter(items), -(-count // shard_size)
            for number in range(of):
                samples = list(pool.map(encode, islice(items, shard_size)))
                files = list(format.pack(number, of, samples))
                rows = [sample.row for sample in samples]
                storage.commit(shard, files, encode_shard(shard, written, rows, files))
                shard, written = shard + 1, written + len(samples)
    losses = finish_shards(storage, format, range(shard), run)
    storage.clean()
    return losses
