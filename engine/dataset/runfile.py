"""What a data set says of itself: run.json, or gd-dataset.json where it was made of another one.

run.json            {"format", "settings": all that decides what is made}
gd-dataset.json     {"format", "samples", and how it was written}
summary.json        what came of a run; written last of all, so a run that has it is complete
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.engine.dataset.formats import FORMATS
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError

RUN, SUMMARY, MARKER = "run.json", "summary.json", "gd-dataset.json"
CLEARING = "clearing"  # in run.json while --overwrite removes the run that was there before
INFER, MERGE, CONVERT = "gd-infer", "gd-dataset merge", "gd-dataset convert"


@dataclass(frozen=True, slots=True)
class About:
    """What made a data set, and how.

    Attributes:
        made_by: INFER, MERGE or CONVERT.
        settings: of the run; of another data set, what its marker says.
        clearing: whether what is there belongs to the run before, which is being removed.
    """

    made_by: str
    format: str
    settings: dict[str, Any]
    clearing: bool = False


def read_about(storage: Storage) -> About | None:
    """What a data set says of itself; None where there is none. Raises UsageError for a damaged file."""
    for name in (RUN, MARKER):
        content = read_json(storage, name)
        if content is None:
            continue
        settings = content.get("settings") if name == RUN else content
        if (
            not isinstance(content.get("format"), str)
            or content["format"] not in FORMATS
            or not isinstance(settings, dict)
            or not are_counts(settings)
        ):
            line = f"{storage.root}/{name} is damaged, or not ours; restore it, or choose another `out`"
            raise UsageError(line, "out")
        made_by = CONVERT if name == MARKER else MERGE if "merged" in settings else INFER
        return About(made_by, content["format"], settings, bool(content.get(CLEARING)))
    return None


def are_counts(settings: dict[str, Any]) -> bool:
    """Whether the plan's numbers are numbers, so that a damaged file is told and not computed with."""
    given = [settings[key] for key in ("samples", "shard_size") if key in settings]
    return all(isinstance(value, int) and value >= 0 for value in given) and settings.get("shard_size") != 0


def run_json(format: str, settings: dict[str, Any], clearing: bool = False) -> bytes:
    """The content of run.json."""
    content = {"format": format, "settings": settings, **({CLEARING: True} if clearing else {})}
    return to_bytes(content)


def to_bytes(content: Any) -> bytes:
    """A JSON file as a person reads it, always with the same bytes."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


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
