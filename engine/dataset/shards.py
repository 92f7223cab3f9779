"""Records of finished shards: what a data set is made of while it grows, and what it is checked against afterwards.

    shards/000012.json
    {"shard": 12, "first": 3072, "samples": 256, "accepted": 250,
     "rejected": [{"index", "reason", "attempts"}], "quarantined": [...],
     "files": {path: SHA-256}, "rows": [of each accepted sample, in order]}

    shards/finish.json
    {"files": {path: SHA-256},          lists, tables, run.json, summary.json and the records: all that no record names
     "added": {path: SHA-256}}          what was put beside them later: a card, train.txt and val.txt

So every file of a finished data set but shards/finish.json has its SHA-256 in another one; that file's own bytes follow
from what it says.

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
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any, BinaryIO, TypeVar, cast

from grounded_diffusion.engine.dataset.formats.common import Encoded, Format
from grounded_diffusion.engine.dataset.rows import AnyRow, ShardRecord
from grounded_diffusion.engine.dataset.runfile import MARKER, RUN, SUMMARY, run_json, to_bytes
from grounded_diffusion.engine.dataset.storage.base import FINISHED, SHARDS, Storage, record_path
from grounded_diffusion.errors import StorageError
from grounded_diffusion.reading import Misfit, as_type, load_json

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Finished:
    """What shards/finish.json says; see above."""

    files: dict[str, str]
    added: dict[str, str] = field(default_factory=dict)


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


def read_shard(
    storage: Storage, shard: int, samples: range | None = None, row: type[AnyRow] = AnyRow
) -> dict[str, Any]:
    """The record of a shard, about these samples, with rows of a type. Raises DamagedShard, or FileNotFoundError."""
    path = record_path(shard)
    try:
        record = load_json(storage.read(path))
        found = as_type(record, cast(Any, ShardRecord)[row])
        indices = [entry.index for entries in (found.rows, found.rejected, found.quarantined) for entry in entries]
        if found.shard != shard:
            raise Misfit(f"shard is {found.shard}, not {shard}")
        if (found.accepted, found.samples) != (len(found.rows), len(indices)):
            raise Misfit("accepted or samples are not those of its lists")
        if samples is not None and sorted(indices) != list(samples):
            raise Misfit("its samples are not those of the shard")
    except Misfit as error:
        again = "remove it, and the same command makes the shard again"
        raise DamagedShard(f"{storage.root}/{path} is damaged; {again} ({error})") from None
    return record


def finished_shards(storage: Storage) -> list[int]:
    """Numbers of the shards that have a record, in order."""
    names = [name.removesuffix(".json") for name in storage.list(SHARDS) if name.endswith(".json")]
    return sorted(int(name) for name in names if name.isdecimal())


class Rows:
    """The rows of shards, in order, read anew at every iteration: one shard is in memory at a time."""

    def __init__(self, storage: Storage, shards: Sequence[int], row: type[AnyRow]):
        self.storage, self.shards, self.row = storage, shards, row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.shards:
            yield from read_shard(self.storage, shard, row=self.row)["rows"]


def digest_of(storage: Storage, path: str) -> str:
    """SHA-256 of a file. Raises FileNotFoundError, StorageError."""
    with storage.open(path) as stream:
        return hashlib.file_digest(cast(BytesIO, stream), "sha256").hexdigest()


class Recording:
    """A storage that notes the SHA-256 of what is written through it, in `files`, and in `removed` what is removed."""

    def __init__(self, storage: Storage):
        self.storage, self.files, self.removed = storage, {}, set()

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

    def remove(self, path: str) -> None:
        self.storage.remove(path)
        self.removed.add(path)


class Hashing:
    """A stream that hashes what is written to it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.stream.write(content)


def read_finished(storage: Storage) -> dict[str, dict[str, str]]:
    """What shards/finish.json says. Raises FileNotFoundError, and DamagedShard where any byte of it has changed."""
    content = storage.read(FINISHED)
    try:
        found = load_json(content)
        as_type(found, Finished)
        if to_bytes(found) != content:
            raise Misfit("not as it was written")
    except Misfit as error:
        again = "remove it, and the same command as before writes it again"
        raise DamagedShard(f"{storage.root}/{FINISHED}: is damaged; {again} ({error})") from None
    return found


def finish_shards(
    storage: Storage,
    format: Format,
    shards: Sequence[int],
    run: Mapping[str, Any],
    last: Mapping[str, bytes] | None = None,
) -> str:
    """Write what describes the whole data set, and note it in shards/finish.json. Returns what the format could not
    hold, "" for nothing.

    Args:
        last: contents of files that are written after all others, by path.
    """
    recording, rows, last = Recording(storage), Rows(storage, shards, format.row), last or {}
    format.finish(cast(Storage, recording), rows, run)  # what it does not have itself it asks of the storage
    files = recording.files | {path: hashlib.sha256(content).hexdigest() for path, content in last.items()}
    before = [*map(record_path, shards), *([RUN] if storage.exists(RUN) else [])]
    files |= {path: digest_of(storage, path) for path in before}
    write_finished(storage, files, added_files(storage, files))
    for path, content in last.items():
        storage.put(path, content)
    return format.losses(rows)


def is_finished(storage: Storage, shards: Sequence[int]) -> bool:
    """Whether shards/finish.json is there, with all that it notes of the data set's own files."""
    try:
        files = read_finished(storage)["files"]
    except (FileNotFoundError, DamagedShard):
        return False
    return {RUN, SUMMARY, *map(record_path, shards)} <= files.keys() and not absent(storage, files)


def absent(storage: Storage, paths: Iterable[str]) -> list[str]:
    """Those files of a list that are not there. Each folder is looked at once."""
    there: dict[str, set[str]] = {}
    lost = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in there:
            there[folder] = set(storage.list(folder))
        if name not in there[folder]:
            lost.append(path)
    return lost


def added_files(storage: Storage, files: Mapping[str, str]) -> dict[str, str]:
    """What an earlier shards/finish.json says was put beside the data set's own files."""
    try:
        return {path: text for path, text in read_finished(storage).get("added", {}).items() if path not in files}
    except (FileNotFoundError, DamagedShard):
        return {}


def write_finished(storage: Storage, files: Mapping[str, str], added: Mapping[str, str]) -> None:
    """Write shards/finish.json."""
    content = {"files": dict(sorted(files.items()))}
    if added:
        content["added"] = dict(sorted(added.items()))
    storage.put(FINISHED, to_bytes(content))


def note_files(recording: Recording) -> None:
    """Note what was written into a finished data set through a recording, so that `verify` expects it."""
    try:
        found = read_finished(recording.storage)
    except (FileNotFoundError, DamagedShard):  # not finished; or to be written again, which verify tells
        return
    own, added = found["files"], found.get("added", {})
    for path in recording.removed:
        own.pop(path, None)
        added.pop(path, None)
    for path, text in recording.files.items():
        (own if path in own else added)[path] = text
    write_finished(recording.storage, own, added)


def write_shards(
    storage: Storage,
    format: Format,
    parts: Iterable[tuple[int, Iterable[Item]]],
    encode: Callable[[Item], Encoded],
    shard_size: int,
    run: Mapping[str, Any],
    last: Callable[[int], Mapping[str, bytes]] = lambda samples: {},
) -> str:
    """Write the shards, lists and tables of what is there already. Returns what the format could not hold.

    Args:
        parts: number of samples and the samples, of each split that has any.
        encode: makes files and row of a sample; called from several threads.
        run: what `Format.finish` is told of the run.
        last: from the number of samples to contents of files that are written after all others, by path.
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
    losses = finish_shards(storage, format, range(shard), run, last(written))
    storage.clean()
    return losses


def write_dataset(
    storage: Storage,
    format: Format,
    parts: Iterable[tuple[int, Iterable[Item]]],
    encode: Callable[[Item], Encoded],
    shard_size: int,
    run: Mapping[str, Any] | None = None,
) -> str:
    """The same as a whole data set, which says what it is: in run.json its settings `run`, or without any in
    gd-dataset.json those of its format.

    Args:
        storage: an empty folder.
    """
    if run:
        storage.put(RUN, run_json(format.name, dict(run)))
        return write_shards(storage, format, parts, encode, shard_size, run)
    about = format.settings.as_json()
    last = lambda samples: {MARKER: to_bytes({"format": format.name, "samples": samples, **about})}
    return write_shards(storage, format, parts, encode, shard_size, {}, last)
