"""run.json, the settings that a data set was begun with, and summary.json, what came of them.

run.json        {"format", "settings"}; another command on the same output must have the same settings
summary.json    written last of all, so a run that has it is complete
"""

from __future__ import annotations

import json
from typing import Any

from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError

RUN, SUMMARY = "run.json", "summary.json"


def write_settings(storage: Storage, format: str, settings: dict[str, Any]) -> None:
    """Begin a data set."""
    put_json(storage, RUN, {"format": format, "settings": settings})


def read_settings(storage: Storage) -> dict[str, Any] | None:
    """The settings of the run that is there; None where there is none. Raises UsageError for a damaged run.json."""
    content = read_json(storage, RUN)
    if content is not None and not isinstance(content.get("settings"), dict):
        line = f"{storage.root}/{RUN} is damaged; restore it, or start again with overwrite"
        raise UsageError(line, "overwrite")
    return content and content["settings"]


def put_json(storage: Storage, path: str, content: dict[str, Any]) -> None:
    """Write a file of the output as JSON that people read too."""
    storage.put(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    """A file of the output as JSON; None where there is none, {} where it is damaged."""
    try:
        content = json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_same(root: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError that names every setting which differs."""
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        told = "; ".join(f"{key} was {show(before.get(key))}, now {show(now.get(key))}" for key in changed)
        line = f"{root} has another run: {told}; give the same command to go on, or `overwrite`"
        raise UsageError(line, "overwrite")


def show(value: Any) -> str:
    """A setting as it appears in a message."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "not set" if value is None else shorten(str(value))


def kind_of(reason: str, kind: str) -> str:
    """A reason without what is particular to the sample: "area of dog" -> "area".

    Args:
        reason: of a shard's record.
        kind: "rejected", whose reasons runs/filters.py gives, or "quarantined".
    """
    return reason.partition(" of " if kind == "rejected" else ";")[0]
