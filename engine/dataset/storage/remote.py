"""Output to an object store behind a URL: s3://, gs://, az:// and whatever else fsspec knows.

An object is there whole or not at all. There are no locks that the store drops with a dead worker; a claim is therefore
an object that its holder renews, and that others may take once it is LEASE seconds old. It is created on the condition
that it does not exist, which S3 and most compatible stores honour. Where a store does not, two workers may make one
shard at the same time: time lost, nothing else, as both write the same bytes
(on machines of one kind, which round alike).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from grounded_diffusion.engine.dataset.storage.base import (
    PARTIAL,
    SHARDS,
    holder,
    lock_path,
    read_holder,
    record_path,
)
from grounded_diffusion.errors import StorageError, UsageError
from grounded_diffusion.reading import Misfit

LEASE, RENEW = 60.0, 15.0  # seconds; a holder that is silent for a LEASE is dead
HELD: set[str] = set()  # keys of the locks that this process holds, as a restarted container may have its old pid
BLOCK = 16 << 20  # bytes of a stream in memory; S3 takes 10,000 blocks, which is 160 GB
GROUP = 32 << 20  # bytes of a shard's files that are sent at the same time


class FsspecStorage:
    """Objects below a URL. Credentials and endpoint come from where the protocol's own tools take them; for S3 these
    are AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or ~/.aws.

    Raises:
        UsageError: fsspec or the protocol's package is not installed, or there is no such protocol.
    """

    def __init__(self, url: str):
        self.root = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs

            self.fs, prefix = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(f"cannot write to {url}: {error}; pip install 'grounded-diffusion[remote]'") from None
        except Exception as error:  # ValueError for an unknown protocol, and whatever its package raises
            raise UsageError(f"cannot write to {url}: {error}") from None
        self.prefix = prefix.rstrip("/")

    def _key(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise StorageError(f"the file {path} lies outside {self.root}; give a path inside it")
        return f"{self.prefix}/{path}".rstrip("/")

    def put(self, path: str, content: bytes) -> None:
        with self._errors("write", path):
            self.fs.pipe_file(self._key(path), content)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        with self._errors("write", path):
            stream = self.fs.open(self._key(path), "wb", block_size=BLOCK, autocommit=False)
        try:
            yield stream
        except BaseException as error:
            with contextlib.suppress(Exception):
                stream.discard()
            stream.closed = True  # or its destructor would send the rest
            ours = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            with self._errors("write", path) if ours else contextlib.nullcontext():
                raise
        with self._errors("write", path):
            stream.close()
            stream.commit()

    def read(self, path: str) -> bytes:
        with self._errors("read", path):
            return self.fs.cat_file(self._key(path))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with self._errors("read", path):
            stream = self.fs.open(self._key(path), "rb")
        with stream:
            yield stream

    def walk(self) -> Iterator[str]:
        with self._errors("list", ""):
            found = self.fs.find(self.prefix)
        yield from (key.removeprefix(f"{self.prefix}/") for key in found)

    def list(self, prefix: str) -> Sequence[str]:
        try:
            with self._errors("list", prefix):
                found = self.fs.ls(self._key(prefix), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file")

    def exists(self, path: str) -> bool:
        with self._errors("look for", path):
            return self.fs.isfile(self._key(path))

    def remove(self, path: str) -> None:
        with self._errors("remove", path), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._key(path))

    @contextlib.contextmanager
    def claim(self, shard: int | str) -> Iterator[bool]:
        path = lock_path(shard)
        if not self._take(path):
            yield False
            return
        HELD.add(self._key(path))
        over = threading.Event()
        renewing = threading.Thread(target=self._renew, args=(path, over), daemon=True)
        renewing.start()
        try:
            yield True
        finally:
            over.set()
            renewing.join()
            HELD.discard(self._key(path))
            self.remove(path)

    def _take(self, path: str) -> bool:
        """Create a lock object, or take one over whose holder is dead."""
        try:
            self.fs.pipe_file(self._key(path), lease(), mode="create")
            return True
        except Exception:  # it exists, or the store does not know the condition, or cannot be written at all
            if self._alive(path):
                return False
        self.put(path, lease())
        return True

    def _alive(self, path: str) -> dict | None:
        """What a lock object says, if there is one and its holder is alive."""
        try:
            lock = read_holder(self.read(path))
            if time.time() - lock["renewed"] > LEASE:
                return None
            if lock["host"] == socket.gethostname():  # a restarted task need not wait for its own lease
                alive = self._key(path) in HELD if lock["pid"] == os.getpid() else is_running(lock["pid"])
                return lock if alive else None
            return lock
        except (FileNotFoundError, Misfit):
            return None

    def _renew(self, path: str, over: threading.Event) -> None:
        while not over.wait(RENEW):
            with contextlib.suppress(Exception):  # a lost lease does no harm, see above
                self.fs.pipe_file(self._key(path), lease())

    def claims(self) -> dict[str, dict]:
        names = [name.removesuffix(".lock") for name in self.list(SHARDS) if name.endswith(".lock")]
        return {name: lock for name in names if (lock := self._alive(lock_path(name)))}

    def commit(self, shard: int, files: Iterable[tuple[str, bytes]], record: bytes) -> None:
        group: dict[str, bytes] = {}
        size = 0
        for path, content in files:
            group[self._key(path)] = content
            size += len(content)
            if size >= GROUP:
                self._send(shard, group)
                group, size = {}, 0
        if group:
            self._send(shard, group)
        self.put(record_path(shard), record)

    def _send(self, shard: int, group: dict[str, bytes]) -> None:
        with self._errors("write", f"shard {shard}"):
            self.fs.pipe(group)

    def clean(self) -> None:
        """Nothing is left half written that could be seen; what was kept of unfinished shards goes."""
        with self._errors("list", PARTIAL), contextlib.suppress(FileNotFoundError):
            left = self.fs.find(self._key(PARTIAL))
            for key in left:
                self.remove(key.removeprefix(f"{self.prefix}/"))

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str) -> Iterator[None]:
        """Turn whatever a store's client raises into one line."""
        try:
            yield
        except (StorageError, UsageError):
            raise
        except FileNotFoundError:
            if verb != "write":
                raise
            raise UsageError(f"cannot write {self.root}/{path}: the bucket does not exist; create it first") from None
        except Exception as error:
            denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
            hint = "; check the credentials and the endpoint" if denied else ""
            message = " ".join(str(error).split()) or type(error).__name__
            kind = UsageError if denied else StorageError
            raise kind(f"cannot {verb} {self.root}/{path}: {message}{hint}") from None


def lease() -> bytes:
    """A lock's content, as of now."""
    return json.dumps(json.loads(holder()) | {"renewed": time.time()}).encode()


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
