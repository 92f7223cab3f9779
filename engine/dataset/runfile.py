"""What a data set says of itself: run.json, or gd-dataset.json where it was made of another one.

run.json            {"format", "settings": all that decides what is made}
gd-dataset.json     {"format", "samples", and how it was written}
summary.json        what came of a run; written last of all, so a run that has it is complete
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict

from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.engine.dataset.formats import FORMATS
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import Count, Misfit, Number, as_type, line_of, load_json

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


class RunSettings(Struct):
    """What of a run's settings is computed with; all of them together are compared as they stand."""

    samples: Number | UnsetType = UNSET  # a merged data set has no plan
    shard_size: Count | UnsetType = UNSET
    model: str | UnsetType = UNSET
    prompts: str | UnsetType = UNSET
    backend: str | UnsetType = UNSET
    batch: Count | UnsetType | None = UNSET
    classes: dict[str, Number] | UnsetType = UNSET
    merged: list[dict[str, Any]] | UnsetType = UNSET


class RunFile(Struct):
    """run.json."""

    format: str
    settings: RunSettings
    clearing: bool = False


class Marker(RunSettings, kw_only=True):
    """gd-dataset.json."""

    format: str


class Summary(Struct):
    """summary.json."""

    samples: Number
    accepted: Number
    rejected: Number = 0
    quarantined: Number = 0
    masks: Number = 0
    reasons: dict[str, Number] = {}


def read_about(storage: Storage) -> About | None:
    """What a data set says of itself; None where there is none. Raises UsageError for a damaged file."""
    for name, kind in ((RUN, RunFile), (MARKER, Marker)):
        try:
            bytes_ = storage.read(name)
        except FileNotFoundError:
            continue
        try:
            content = load_json(bytes_)
            as_type(content, kind, bytes_)
            if content["format"] not in FORMATS:
                raise Misfit(f"there is no format {content['format']!r}", line_of(bytes_, "format"))
        except Misfit as error:
            line = f"{error.at(f'{storage.root}/{name}')}; the file is damaged, or not ours: restore it, or choose"
            raise UsageError(f"{line} another `out`", "out") from None
        settings = content["settings"] if name == RUN else content
        made_by = CONVERT if name == MARKER else MERGE if "merged" in settings else INFER
        return About(made_by, content["format"], settings, bool(content.get(CLEARING)))
    return None


def run_json(format: str, settings: dict[str, Any], clearing: bool = False) -> bytes:
    """The content of run.json."""
    content = {"format": format, "settings": settings, **({CLEARING: True} if clearing else {})}
    return to_bytes(content)


def to_bytes(content: Any) -> bytes:
    """A JSON file as a person reads it, always with the same bytes."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def read_summary(storage: Storage) -> dict[str, Any] | None:
    """What came of a run; None where summary.json is missing or damaged."""
    try:
        content = load_json(storage.read(SUMMARY))
        return asdict(as_type(content, Summary)) | content
    except (FileNotFoundError, Misfit):
        return None


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
