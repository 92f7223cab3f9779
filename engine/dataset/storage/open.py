"""Storage by its address."""

from __future__ import annotations

from pathlib import Path

from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.storage.remote import FsspecStorage
from grounded_diffusion.errors import UsageError


def open_storage(out: str | Path) -> Storage:
    """A folder, or a URL such as s3://bucket/prefix. Creates nothing. Raises UsageError."""
    if not str(out):
        raise UsageError("`out` is empty, which would be the current folder; write . if that is meant", "out")
    scheme, separator, rest = str(out).partition("://")
    if not separator or scheme == "file":
        return LocalStorage(Path(rest if separator else out))
    return FsspecStorage(str(out))
