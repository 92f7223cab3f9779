"""Storage by its address."""

from __future__ import annotations

from pathlib import Path

from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.storage.remote import FsspecStorage
from grounded_diffusion.files import check_place


def open_storage(out: str | Path) -> Storage:
    """A folder, or a URL such as s3://bucket/prefix. Creates nothing. Raises UsageError."""
    check_place(str(out), "out")
    scheme, separator, rest = str(out).partition("://")
    if not separator or scheme == "file":
        return LocalStorage(Path(rest if separator else out))
    return FsspecStorage(str(out))
