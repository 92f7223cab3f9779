"""Where a bundle may be written, and how it appears there all at once or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from grounded_diffusion.bundle import MANIFEST, read_manifest
from grounded_diffusion.engine.backends.tensorrt.store import PACKAGES, PLAN, SIDECAR, read_sidecar
from grounded_diffusion.errors import BackendError, BundleError, UsageError
from grounded_diffusion.files import check_folder, fresh_folder, readable_errors


def check_output(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless a bundle can be written at `out`. Only an earlier bundle is ever replaced."""
    with readable_errors(out):
        if out.is_dir() and any(out.iterdir()):
            if not files_of_bundle(out):
                raise UsageError(f"{out} is not empty and holds no bundle, so it is not replaced; give another --out")
            if not overwrite:
                raise UsageError(f"{out} is not empty; give another --out, or --overwrite to replace the bundle there")
        check_folder(out, overwrite, files_of_bundle)
        parent = next(p for p in out.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {parent}; give --out a place you may write to")


def files_of_bundle(path: Path) -> set[str]:
    """The files that a bundle's manifest and the descriptions of its engines name; none where there is no bundle."""
    try:
        names = {MANIFEST, *read_manifest(path).files}
    except (BundleError, TypeError):
        return set()
    for backend in PACKAGES:
        for file in (path / "engines" / backend).glob(f"*/{SIDECAR}"):
            with contextlib.suppress(BackendError):
                read_sidecar(file.parent)
                names |= {file.with_name(name).relative_to(path).as_posix() for name in (PLAN, SIDECAR)}
    return names


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when all goes well, in the place of a bundle, and vanishes
    when not. Raises UsageError as `check_output` does."""
    with fresh_folder(out, True, files_of_bundle) as work:
        yield work
