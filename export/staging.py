"""Where a bundle may be written, and how it appears there all at once or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grounded_diffusion.bundle import MANIFEST
from grounded_diffusion.errors import UsageError


def check_output(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless a bundle can be written at `out`. Only an earlier bundle is ever replaced."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give --out a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"{out} is not empty; give another --out, or --overwrite to replace the bundle there")
        if not (out / MANIFEST).is_file():
            raise UsageError(f"{out} is not empty and holds no bundle, so it is not replaced; give another --out")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write to {parent}; give --out a place you may write to")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when all goes well and vanishes when not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        yield work
        work.chmod(0o755)
        old = None
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
            out.rename(old / "bundle")
        work.rename(out)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
