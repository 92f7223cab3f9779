"""What of an output is ours: what our own valid records name, and nothing else.

run.json or gd-dataset.json says that there is a data set. Its shards' records name their files, shards/finish.json the
lists and tables, .partial/ what a killed worker was about to put in place. All else is somebody else's: it is never
removed, and where it is in the way the command is refused with its name.
"""

from __future__ import annotations

import re
from pathlib import Path

from grounded_diffusion.engine.dataset.runfile import INFER, MARKER, RUN, SUMMARY, About, read_about, read_summary
from grounded_diffusion.engine.dataset.shards import DamagedShard, finished_shards, read_finished, read_shard
from grounded_diffusion.engine.dataset.storage.base import (
    FINISHED,
    JOURNAL,
    PARTIAL,
    SHARDS,
    Storage,
    record_path,
)
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import check_foreign, readable_errors
from grounded_diffusion.reading import Misfit, decode

LOCK = re.compile(rf"{SHARDS}/(\d+|[a-z]+)\.lock")


def check_output(storage: Storage) -> About | None:
    """The run of gd-infer in an output; None where it is empty. Raises UsageError where it is neither."""
    folder = Path(storage.root)
    with readable_errors(folder, "read"):
        if folder.is_file():
            raise UsageError(f"{folder} is a file; give `out` a folder", "out")
        if about := read_about(storage):
            check_made_by(storage, about, INFER)
            return about
        found = {path.name for path in folder.iterdir()} if folder.is_dir() else set(storage.list(""))
    if found - {PARTIAL, SHARDS}:
        line = f"{storage.root} is not empty and was not written by gd-infer; choose another `out`"
        raise UsageError(line, "out")
    return None


def check_made_by(storage: Storage, about: About, command: str) -> None:
    """Raise UsageError for a data set that another command has made."""
    if about.made_by != command:
        line = f"{storage.root} was made by {about.made_by}, not by {command}; choose another `out`"
        raise UsageError(line, "out")


def folder_files(folder: Path, command: str) -> set[str]:
    """Names of the files of the data set in a folder; none where there is none.

    Raises:
        UsageError: another command has made it, or its run.json is damaged.
    """
    storage = open_storage(folder)
    if not (about := read_about(storage)):
        return set()
    check_made_by(storage, about, command)
    return named_files(storage, list(storage.walk()))


def check_foreign_files(storage: Storage) -> list[str]:
    """All files of an output, which must be ours. Raises UsageError that names what is not."""
    found = [path for path in storage.walk() if path != f"{SHARDS}/"]  # empty, of a run that has no shard yet
    check_foreign(storage.root, found, named_files(storage, found))
    return found


def clear(storage: Storage) -> None:
    """Remove a data set but for its run.json and what is claimed; the records after what they name.

    One that is interrupted is so known to be ours when it goes on.

    Raises:
        UsageError: there is anything else; nothing is removed then.
    """
    order = lambda path: (path.startswith(f"{SHARDS}/"), path == FINISHED)
    for path in sorted(check_foreign_files(storage), key=order):
        if path != RUN and not LOCK.fullmatch(path) and not path.startswith(f"{PARTIAL}/"):
            storage.remove(path)
    storage.clean()


def named_files(storage: Storage, found: list[str]) -> set[str]:
    """The files among `found` that the records of a data set name. Some 100 bytes of memory each."""
    named = {RUN, MARKER}
    for shard in finished_shards(storage):
        try:
            named |= {record_path(shard), *read_shard(storage, shard)["files"]}
        except (DamagedShard, FileNotFoundError):
            continue
    try:
        for files in read_finished(storage).values():
            named |= files.keys()
        named.add(FINISHED)
    except (DamagedShard, FileNotFoundError):
        pass
    if read_summary(storage):
        named.add(SUMMARY)
    for path in found:
        if LOCK.fullmatch(path) or path.startswith(f"{PARTIAL}/"):
            named.add(path)
        if path.startswith(f"{PARTIAL}/") and path.endswith(f"/{JOURNAL}"):
            named |= journal(storage, path)
    return named


def journal(storage: Storage, path: str) -> set[str]:
    """The names that a killed worker was about to give its files."""
    try:
        return set(decode(storage.read(path), list[str]))
    except (Misfit, FileNotFoundError):
        return set()
