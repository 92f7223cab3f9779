"""Output to a local folder, or one that many machines mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from grounded_diffusion.engine.dataset.storage.base import (
    JOURNAL,
    PARTIAL,
    SHARDS,
    holder,
    lock_path,
    read_holder,
    record_path,
)
from grounded_diffusion.errors import DiskFullError, StorageError, UsageError
from grounded_diffusion.files import files_below, inside, writing

SYNCS = 16  # files synced at the same time, which ext4 gathers into few journal commits: 20 times faster than in turn

OF_THE_PATH = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
BLOCK = 4096  # bytes in which most file systems give space


class LocalStorage:
    """A folder. Files are written under .partial/, synced to the disk and renamed; claims are flock(2) locks, which the
    system drops with the process that held them, on NFS and Lustre (mounted with `flock`) as well.
    """

    def __init__(self, folder: Path):
        self.folder, self.root = folder, str(folder)

    def _file(self, path: str) -> Path:
        return inside(self.folder, path)

    def put(self, path: str, content: bytes) -> None:
        with readable_errors(self.folder, need=on_disk(content), what=path), self._stream(path) as stream:
            stream.write(content)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        with readable_errors(self.folder, what=path), self._stream(path) as stream:
            yield stream

    @contextlib.contextmanager
    def _stream(self, path: str) -> Iterator[BinaryIO]:
        final, scratch = self._file(path), self._file(PARTIAL)
        make_folders(scratch)
        make_folders(final.parent)
        with writing(final, scratch) as stream:
            yield stream
        sync(final.parent)

    def read(self, path: str) -> bytes:
        with self.open(path) as stream:
            return stream.read()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        file = self._file(path)
        try:
            mode = file.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe or a device would be waited for, or never end
                raise UsageError(f"cannot read {file}: it is no regular file; put the file itself in its place")
            stream = file.open("rb")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise refusal(error, "read", file) from None
        with stream:
            yield stream

    def walk(self) -> Iterator[str]:
        try:
            yield from files_below(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UsageError(f"cannot read {error.filename or self.root}: {error.strerror or error}") from None

    def list(self, prefix: str) -> Sequence[str]:
        try:
            with os.scandir(self._file(prefix)) as entries:
                return sorted(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UsageError(f"cannot read {self._file(prefix)}: {error.strerror or error}") from None

    def exists(self, path: str) -> bool:
        return self._file(path).is_file()

    def remove(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        file = self._file(folder) / name  # of a link, the link itself is removed
        with readable_errors(self.folder, what=path):
            file.unlink(missing_ok=True)
            remove_empty(file.parent, self.folder)

    @contextlib.contextmanager
    def claim(self, shard: int | str) -> Iterator[bool]:
        path = self._file(lock_path(shard))
        with readable_errors(self.folder, what=lock_path(shard)):
            make_folders(path.parent)
            stream = take(path)
        if stream is None:
            yield False
            return
        with stream:
            shutil.rmtree(self.folder / PARTIAL / path.stem, ignore_errors=True)  # what a dead worker left
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    def claims(self) -> dict[str, dict]:
        held = {}
        for name in self.list(SHARDS):
            if name.endswith(".lock"):
                with contextlib.suppress(OSError, ValueError), self._file(f"{SHARDS}/{name}").open("rb") as stream:
                    try:
                        fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        held[name.removesuffix(".lock")] = read_holder(stream.read())
        return held

    def commit(self, shard: int, files: Iterable[tuple[str, bytes]], record: bytes) -> None:
        folder = self._file(f"{PARTIAL}/{shard:06d}")
        paths: list[str] = []
        need, rest = on_disk(record), iter(files)
        with readable_errors(self.folder, need=lambda: need + sum(on_disk(content) for _, content in rest),
                             what=f"shard {shard}", folder=folder):  # fmt: skip
            for path, content in rest:
                need += on_disk(content)
                temporary = folder / self._file(path).relative_to(self.folder)
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(content)
                paths.append(path)
            with ThreadPoolExecutor(SYNCS) as pool:
                for _ in pool.map(sync, (folder / path for path in paths)):
                    pass  # raises what a thread raised
            folder.mkdir(parents=True, exist_ok=True)
            (folder / JOURNAL).write_text(json.dumps(paths), encoding="utf-8")
            parents = {self._file(path).parent for path in paths}
            for parent in sorted(parents):
                make_folders(parent)
            for path in paths:
                (folder / path).rename(self._file(path))
            for parent in sorted(parents):
                sync(parent)
            with self._stream(record_path(shard)) as stream:
                stream.write(record)
            shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)


def take(path: Path) -> BinaryIO | None:
    """The locked stream of a lock file, or None if another process holds it."""
    while True:
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                try:
                    stream.truncate()
                    stream.write(holder())
                    stream.flush()
                except OSError:  # a full disk: nobody is to find a lock that says nothing
                    path.unlink(missing_ok=True)
                    raise
                return stream
        except BlockingIOError:
            stream.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            stream.close()
            raise
        stream.close()  # its holder removed it between our open and our lock: again, with the file that is there now


def make_folders(folder: Path) -> None:
    """mkdir -p, each new entry synced."""
    if not folder.is_dir():
        make_folders(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError:  # as /proc says it
            raise PermissionError(errno.EACCES, "no folder can be made there", str(folder)) from None
        sync(folder.parent)


def check_writable(folder: Path) -> None:
    """Raise UsageError where nothing can be written into a folder, which need not be there yet."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise UsageError(f"cannot write {folder}: {os.strerror(code)}")


def remove_empty(folder: Path, root: Path) -> None:
    """Remove `folder` and its parents below `root` as long as they are empty."""
    with contextlib.suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def readable_errors(root: Path, *, need=0, what: str = "", folder: Path | None = None) -> Iterator[None]:
    """Turn an OSError into one line.

    Args:
        root: the run's folder.
        need: bytes of what is being written, or a function that counts them; 0 if not known.
        what: what is being written.
        folder: removed when the disk is full, so that what is reported as free is free.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"cannot write {root / what}: {error.filename} is a file, not a folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise refusal(error, "write", root / what) from None
        size = need() if callable(need) else need
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise DiskFullError(full(root, what, size, error.errno)) from None


def refusal(error: OSError, verb: str, path: Path) -> UsageError | StorageError:
    """What to say of a file that the system refuses: the user's matter where the path itself is what is wrong."""
    kind = UsageError if error.errno in OF_THE_PATH else StorageError
    return kind(f"cannot {verb} {error.filename2 or error.filename or path}: {error.strerror or error}")


def full(root: Path, what: str, need: int, code: int) -> str:
    """The message of a full disk."""
    while not root.exists():
        root = root.parent
    status = os.statvfs(root)
    needs = f" needs {megabytes(need)}" if need else " does not fit"
    if code == errno.EDQUOT:
        free = "your quota is used up"
    elif not status.f_favail and status.f_files:
        free = "the file system has no inodes left"
    else:
        free = f"{megabytes(status.f_bavail * status.f_frsize)} are free"
    return f"no space left in {root}: {what}{needs}, {free}; make room, then give the same command again"


def megabytes(size: float) -> str:
    """12345678 -> "12.3 MB", 12345 -> "12 kB"."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def on_disk(content: bytes) -> int:
    """Bytes that a file takes."""
    return -(-len(content) // BLOCK) * BLOCK
