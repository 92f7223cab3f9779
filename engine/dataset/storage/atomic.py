"""Files and folders that appear whole or not at all, for the commands that work on a local disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grounded_diffusion.errors import UsageError


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    """Turn an OSError into a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise UsageError(f"cannot write {where}: {error.strerror or error}") from None


@contextlib.contextmanager
def fresh_folder(out: Path, overwrite: bool, is_ours: str) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well and is removed when it does not.

    Args:
        overwrite: replace a folder that is not empty, if it has a file `is_ours`.

    Raises:
        UsageError: `out` is a file, not empty, not ours, or cannot be written.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / is_ours).is_file():
            raise UsageError(f"{out} is not empty and was not written by this command; choose another --out")
        if not overwrite:
            raise UsageError(f"{out} is not empty; --overwrite replaces it")
    with readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            folder = temporary / "new"
            folder.mkdir()
            yield folder
            if out.is_dir():
                out.rename(temporary / "old")
            folder.rename(out)
        finally:
            if not out.exists() and (temporary / "old").exists():
                (temporary / "old").rename(out)
            shutil.rmtree(temporary, ignore_errors=True)
