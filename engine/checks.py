"""Checks of values from outside, and words about them, for all rooms of the engine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from grounded_diffusion.errors import UsageError


def check_int(value: Any, name: str, low: int, high: int) -> None:
    """Raise UsageError unless `value` is a whole number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}", name)


def check_float(value: Any, name: str, low: float, high: float) -> None:
    """Raise UsageError unless `value` is a finite number from low to high."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}", name)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: Exception) -> str:
    """The first line of a message, for errors of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(text: str, limit: int = 60) -> str:
    """`text`, cut to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(names: Iterable[str], most: int = 5) -> str:
    """ "a, b, c", of many the first ones and how many more there are, sorted."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """ "1:05", "2:00:09" or "3 d 04:10"."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600:02}:{seconds % 3600 // 60:02}"
    hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
    return f"{hours}{seconds % 3600 // 60:{'02' if hours else ''}}:{seconds % 60:02}"
