"""Files and folders on a local disk: they appear whole or not at all, and nothing of anybody else's is touched."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from grounded_diffusion.errors import StorageError, UsageError

SHOWN = 3  # names that a message lists
MAX_LINE = 1_000_000  # bytes; a prompt with 254 names of 64 characters, whatever they are, takes 65,000
MAX_STREAM = 1 << 30  # bytes of what cannot be read twice


def check_place(text: str, *fields: str) -> None:
    """Raise UsageError for what nobody means by a path or a URL, though the system would take it as it stands.

    Args:
        text: as it was given.
        fields: the field that it was given for, if it has a name.
    """
    shown = text if len(text) <= 100 else f"{text[:97]}..."
    named = f"`{fields[0]}`" if fields else "a path"
    if not text.strip():
        raise UsageError(f"{named} is empty, which would be the current folder; write . if that is meant", *fields)
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{named} {shown!r} has a character that no file is called by here; rename the file", *fields)
    if text.startswith("~"):
        raise UsageError(f"{shown} begins with ~, which only a shell knows; write it in full, or ./{shown}", *fields)
    if match := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/(?!/)", text):
        line = f"{shown} is a folder called {match[1]}: here; write {match[1]}:// for a URL, or ./{shown}"
        raise UsageError(line, *fields)


def local_path(text: str) -> Path:
    """A path of this machine, as a command line gives it. Raises UsageError for "", a URL, and as `check_place`."""
    check_place(text)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "file":
        raise UsageError(f"{text} is a URL, and this takes a path of this machine; copy the files here first")
    return Path(rest if separator else text)


def lines_of(stream: BinaryIO, name: object) -> Iterator[bytes]:
    """Lines of a file that people write, read piece by piece. Raises UsageError for one of over MAX_LINE bytes."""
    number = 1
    while line := stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise UsageError(f"{name}:{number}: the line has over {MAX_LINE:,} bytes; is this a file of lines?")
        yield line
        number += 1


def read_stream(stream: BinaryIO, name: object) -> bytes:
    """All lines of what has an end, and cannot be read twice. Raises UsageError as `lines_of`, and over MAX_STREAM."""
    content = bytearray()
    for line in lines_of(stream, name):
        content += line
        if len(content) > MAX_STREAM:
            raise UsageError(f"{name} has over {MAX_STREAM:,} bytes; write it to a file, which is read piece by piece")
    return bytes(content)


def inside(root: Path, path: str) -> Path:
    """A file below `root` by its relative name, with forward slashes.

    Raises:
        StorageError: the name leads out of `root`, by itself or by a symbolic link below it.
    """
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\0" in path:
        raise StorageError(f"the file {path!r} lies outside {root}; give a path inside it")
    file = root
    for part in parts.parts:
        file = file / part
        if file.is_symlink():
            raise StorageError(f"{file} is a symbolic link; put the file or folder itself in its place")
    return file


@contextlib.contextmanager
def writing(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A stream to a file that is there once the block ends, also after a power cut, and not if the block raises.

    The content first goes into a file of another, new name, beside it or in the folder `scratch`.

    Raises:
        UsageError: what is there is no regular file.
        OSError: it cannot be written.
    """
    check_regular(path)
    temporary = (scratch or path.parent) / f".{path.name[:40]}.{secrets.token_hex(6)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole, in the place of an older one. Raises as `writing` does."""
    with writing(path) as stream:
        stream.write(content)


def check_regular(path: Path) -> None:
    """Raise UsageError where there is something else than a regular file: a folder, a link, a device."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(f"{path} is not a regular file, and is not replaced; give another name")


def check_target(path: Path, option: str, suffixes: tuple[str, ...], begins: bytes = b"") -> None:
    """Raise UsageError unless a file may be written at `path`, in the place of its own kind alone.

    Args:
        option: the field that the file was named by.
        suffixes: one of them ends the name.
        begins: what a file that is there begins with, unless it is empty.
    """
    if not path.parent.is_dir():
        line = f"cannot write {path}: No such file or directory; give `{option}` a file in a folder that exists"
        raise UsageError(line, option)
    if path.suffix not in suffixes:
        raise UsageError(f"`{option}` takes a name that ends in {' or '.join(suffixes)}, not {path}", option)
    with readable_errors(path):
        check_regular(path)
        if begins and path.is_file():
            with path.open("rb") as stream:
                if stream.read(len(begins)) not in (b"", begins):
                    line = f"{path} was not written by `{option}`, and is not replaced; give another name"
                    raise UsageError(line, option)


def os_error_line(error: OSError) -> str:
    """What went wrong, with the file, in one line."""
    where = error.filename2 or error.filename
    return f"{f'{where}: ' if where else ''}{error.strerror or error}"


@contextlib.contextmanager
def readable_errors(out: Path, verb: str = "write") -> Iterator[None]:
    """Turn an OSError into a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or out
        raise UsageError(f"cannot {verb} {where}: {error.strerror or error}") from None


def files_below(folder: Path, prefix: str = "") -> Iterator[str]:
    """Relative names of everything below a folder that is no folder, and of the empty folders, which end in "/".

    Links are not followed: their own names are given.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir(follow_symlinks=False):
                yield prefix + entry.name
                continue
            below = files_below(Path(entry.path), f"{prefix}{entry.name}/")
            if (first := next(below, None)) is None:
                yield f"{prefix}{entry.name}/"
            else:
                yield first
                yield from below


def remove_files(folder: Path, names: set[str]) -> None:
    """Remove files below a folder, and the folders that this leaves empty, `folder` too."""
    for name in names:
        file = folder / name
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            file.unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(parent).rmdir()


def check_foreign(where: str, found: Iterable[str], named: set[str]) -> None:
    """Raise UsageError that names files which are not ours.

    Args:
        where: the folder or URL, for the message.
        found: what is there, as `files_below` tells it.
        named: the files that are ours; a folder that was made for one of them is ours too.
    """
    folders = {f"{parent}/" for name in named for parent in PurePosixPath(name).parents}
    foreign = [name for name in found if name not in named and name not in folders]
    if foreign:
        shown, more = ", ".join(foreign[:SHOWN]), len(foreign) - SHOWN
        others = f" and {more} more" if more > 0 else ""
        raise UsageError(
            f"{where} also holds what was not written by this command: {shown}{others}; nothing is removed. Move it "
            "away, or choose another `out`",
            "out",
        )


def check_folder(out: Path, overwrite: bool, ours: Callable[[Path], set[str]]) -> set[str]:
    """Raise UsageError unless a new folder may take the place of `out`; returns the files that are removed then.

    Args:
        overwrite: whether what is ours there is replaced.
        ours: names, below a folder, the files that records of ours say are ours; none where it is not ours.
    """
    with readable_errors(out, "read"):
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file; give `out` a folder", "out")
        found = list(files_below(out)) if out.exists() else []
    if not found:
        return set()
    if not (named := ours(out)):
        raise UsageError(f"{out} is not empty and was not written by this command; choose another `out`", "out")
    check_foreign(str(out), found, named)
    if not overwrite:
        raise UsageError(f"{out} is not empty; `overwrite` replaces it", "overwrite")
    return set(found)


@contextlib.contextmanager
def fresh_folder(out: Path, overwrite: bool, ours: Callable[[Path], set[str]]) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well and is removed when it does not.

    Args: see `check_folder`.

    Raises:
        UsageError: `out` is a file, is not ours, holds anything else beside what is ours, or cannot be written.
    """
    out = out.resolve()
    check_folder(out, overwrite, ours)
    with readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        work.mkdir(mode=0o700)
        new, old = work / "new", work / "old"
        try:
            new.mkdir()
            yield new
            named = check_folder(out, overwrite, ours)  # again: much may have happened since
            if out.is_dir():
                out.rename(old)
            new.rename(out)
            remove_files(old, named)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
            remove_files(new, set(files_below(new)) if new.exists() else set())
            with contextlib.suppress(OSError):
                work.rmdir()
