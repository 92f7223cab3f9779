"""Where a run's files go: a local folder, or an object store behind a URL. Nothing is ever there by half.

A shard is the unit of work. Its files come first and its record last, so what has a record is complete; whatever a
killed worker left without one is written again, with the same bytes.

    shards/000012.json      record of a finished shard
    shards/000012.lock      held by the worker that is on it: {"host", "pid", "started"}
    .partial/               local only: files that are being written, and what a shard's files will be called
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol

from msgspec import Struct
from msgspec.structs import asdict

from grounded_diffusion.reading import Count, decode

SHARDS, PARTIAL = "shards", ".partial"
FINISHED = f"{SHARDS}/finish.json"
JOURNAL = ".files"  # in .partial/000012/: JSON list of the names that its files get
FINISH = "finish"  # what to claim for the one who writes a finished run's lists and tables


class Storage(Protocol):
    """Paths are relative, with forward slashes. Every failure is one line of UsageError, DiskFullError or StorageError.

    Attributes:
        root: the folder or URL, for messages.
    """

    root: str

    def put(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all; it replaces an older one."""
        ...

    def create(self, path: str) -> AbstractContextManager[BinaryIO]:
        """The same for a stream: the file is there once the block ends, and not if the block raises."""
        ...

    def read(self, path: str) -> bytes:
        """Content of a file. Raises FileNotFoundError."""
        ...

    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """The same as a stream. Raises FileNotFoundError."""
        ...

    def walk(self) -> Iterator[str]:
        """Paths of all files, and those of empty folders, which end in a slash."""
        ...

    def list(self, prefix: str) -> Sequence[str]:
        """Names of the files directly under a folder, sorted; none if there is no such folder."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, and the folders that it leaves empty. Quiet if there is none."""
        ...

    def claim(self, shard: int | str) -> AbstractContextManager[bool]:
        """Hold a shard (or FINISH) against other workers; False if another holds it. A dead worker holds nothing.

        The holder may have finished between a look at the records and the claim: look again inside the block.
        """
        ...

    def claims(self) -> dict[str, dict]:
        """What living workers hold: "000012" -> {"host", "pid", "started"}."""
        ...

    def commit(self, shard: int, files: Iterable[tuple[str, bytes]], record: bytes) -> None:
        """Write a shard: its files, and when all are safe its record. `files` is iterated once."""
        ...

    def clean(self) -> None:
        """Remove .partial/ with what dead workers left in it. For the last to write: who holds FINISH, at its end."""
        ...


def record_path(shard: int) -> str:
    """Where the record of a shard is."""
    return f"{SHARDS}/{shard:06d}.json"


def lock_path(shard: int | str) -> str:
    """Where the lock of a shard is."""
    return f"{SHARDS}/{shard if isinstance(shard, str) else f'{shard:06d}'}.lock"


class Holder(Struct):
    """What a lock says."""

    host: str
    pid: Count
    started: str
    renewed: float = 0.0


def read_holder(content: bytes) -> dict[str, Any]:
    """What a lock says. Raises Misfit."""
    return asdict(decode(content, Holder))


def holder() -> bytes:
    """What a lock says: who holds it, and since when."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}).encode()
