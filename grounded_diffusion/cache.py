"""What is kept between runs in the user's cache: exported bundles, compiled kernels, measured settings."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import replace_file

NAME = "grounded-diffusion"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/grounded-diffusion, or ~/.cache/grounded-diffusion; for a user without a home that can be
    written, as in a container, a folder of that user's own among the temporary files.

    Raises:
        UsageError: somebody else has taken that last folder.
    """
    if Path(base := os.environ.get("XDG_CACHE_HOME", "")).is_absolute():
        return Path(base) / NAME
    try:
        folder = Path.home() / ".cache" / NAME
    except RuntimeError:  # no HOME, and no entry for this user id
        return private_folder()
    return folder if folder.is_absolute() and is_usable(folder) else private_folder()


def is_usable(folder: Path) -> bool:
    """Whether a folder is there, or can be made."""
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError:
        return False
    return there == folder or os.access(there, os.W_OK | os.X_OK)


def private_folder() -> Path:
    """A folder of this user's own among the temporary files, where nobody else can put anything. Raises UsageError."""
    folder = Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    except OSError:
        safe = False
    if not safe:
        raise UsageError(f"there is no home to keep files in, and {folder} cannot be used; set XDG_CACHE_HOME")
    return folder


def write_cached(file: Path, content: bytes | memoryview) -> None:
    """Write a file whole, so that another process never reads half of it. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content)
