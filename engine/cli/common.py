"""What the commands share: a parser with errors of one line, notes, the way from an exception to an exit status."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from grounded_diffusion.errors import BadPrompts, GroundedDiffusionError, UsageError
from grounded_diffusion.files import os_error_line

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Parser(argparse.ArgumentParser):
    """Reports bad options as every other error: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_size(text: str) -> tuple[int, int]:
    """ "512" or "512x768" -> (height, width)."""
    if not (match := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give pixels, as in 512, or HEIGHTxWIDTH")
    return int(match[1]), int(match[2] or match[1])


def parse_seed(text: str) -> int | str:
    """A seed, or "random"."""
    if text != "random" and not re.fullmatch(r"-?\d{1,30}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number, or random")
    return text if text == "random" else int(text)


def note(command: str, line: str) -> None:
    """One line to the person who waits."""
    print(f"{command}: {line}", file=sys.stderr, flush=True)


def run_command(
    command: str, body: Callable[[], int | None], flags: Mapping[str, str] | None = None, interrupted: str = ""
) -> int:
    """Run a command; what goes wrong on purpose becomes one line and its exit status.

    Args:
        command: its name, before each line.
        body: what it does; returns the exit status, None for 0.
        flags: the options whose names are not those of the fields that they set. None where the command's errors name
            no fields.
        interrupted: what to say after Ctrl-C, if anything.
    """
    try:
        return body() or 0
    except GroundedDiffusionError as error:
        for problem in error.problems if isinstance(error, BadPrompts) else ():
            note(command, in_flags(problem, flags or {}))
        note(command, str(error) if flags is None else in_flags(error, flags))
        return error.exit_code
    except OSError as error:  # a folder that may not be read, say: whatever nobody has put into words before
        note(command, os_error_line(error))
        return UsageError.exit_code
    except KeyboardInterrupt:
        if interrupted:
            note(command, interrupted)
        return INTERRUPTED


def in_flags(error: GroundedDiffusionError, flags: Mapping[str, str]) -> str:
    """An error's line with options in place of fields: "min_area is over ..." -> "--min-area is over ...".

    Where a field is in backquotes, because its name is a word of the line as well, only that place is meant.
    """
    line = error.message if isinstance(error, BadPrompts) else str(error)
    for field in getattr(error, "fields", ()):
        place = f"`{field}`" if f"`{field}`" in line else rf"(?<![\w-]){field}(?!\w)"
        line = re.sub(place, flags.get(field, f"--{field.replace('_', '-')}"), line)
    return line
