"""What the commands share: a parser with errors of one line, notes, the way from an exception to an exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from grounded_diffusion import __version__
from grounded_diffusion.cache import cache_folder, private_folder, write_cached
from grounded_diffusion.errors import BadPrompts, GroundedDiffusionError, UsageError
from grounded_diffusion.files import os_error_line

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells have it
MOST = 440  # characters of a line
NO_MEMORY = ("can't start new thread", "can't allocate memory")  # so Python and torch say it in a RuntimeError
MAY_BE_EMPTY = ("--negative-prompt", "--peers")  # options for which "" says something


class Parser(argparse.ArgumentParser):
    """What every command has: errors in one line as all others, no empty values, --version and --debug."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.add_argument("--version", action="version", version=f"{self.prog.split()[0]} {__version__}")
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show where in the program an error arose"
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base class has it. Raises UsageError for a value that is empty."""
        words, before = list(sys.argv[1:] if args is None else args), ""
        for word in words:
            name, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
            if equals and not value.strip() and name not in MAY_BE_EMPTY:
                here = ", which would be the current folder; write . if that is meant" if name == "--out" else ""
                self.error(f"{name if name.startswith('-') else 'an argument'} is empty{here}")
            before = word
        return super().parse_known_args(words, namespace)


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
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        print(f"{command}: {one_line(line)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """A text on one line and under MOST characters, whatever it was made of: the middle is left out."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 3 :]}"


def run_command(
    command: str,
    body: Callable[[], int | None],
    flags: Mapping[str, str] | None = None,
    interrupted: str = "",
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command; what goes wrong becomes one line and its exit status.

    Args:
        command: its name, before each line.
        body: what it does; returns the exit status, None for 0.
        flags: the options whose names are not those of the fields that they set. None where the command's errors name
            no fields.
        interrupted: what to say after Ctrl-C, if anything.
        argv: its arguments; None for those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.suppress(AttributeError):  # a stream of another kind, or none
            cast(Any, sys.stdout).reconfigure(errors="backslashreplace")
        check_words(words)
        status = body() or 0
        finish_output()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in words:
            traceback.print_exc()
        return tell(command, error, flags, interrupted, words)


def tell(
    command: str, error: BaseException, flags: Mapping[str, str] | None, interrupted: str, words: Sequence[str]
) -> int:
    """Say in a line how a command has ended; returns its exit status."""
    if isinstance(error, GroundedDiffusionError):
        for problem in error.problems if isinstance(error, BadPrompts) else ():
            note(command, in_flags(problem, flags or {}))
        note(command, str(error) if flags is None else in_flags(error, flags))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        if interrupted:
            note(command, interrupted)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # as of a shell's `| head`
        drop_output()
        return BROKEN_PIPE
    if isinstance(error, OSError):  # a folder that may not be read, say: whatever nobody has put into words before
        note(command, os_error_line(error))
        with contextlib.suppress(UsageError, OSError):  # it may have been the output's
            finish_output()
        return UsageError.exit_code
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        note(command, "there is not enough memory, or there are too many threads, for this; try less at once")
        return GroundedDiffusionError.exit_code
    what = f"{type(error).__name__}: {one_line(str(error))[:200]}"
    note(command, f"this is a bug, {what}; {report(command, error, words)}")
    return GroundedDiffusionError.exit_code


def check_words(words: Sequence[str]) -> None:
    """Raise UsageError for an argument that is no text."""
    for word in words:
        if "\0" in word or any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(f"the argument {word[:100]!r} is not UTF-8, or has a NUL; write or rename it in UTF-8")


def report(command: str, error: BaseException, words: Sequence[str]) -> str:
    """Write what helps to find a bug; returns where it is, for the line."""
    content = "\n".join([
        f"{command} {__version__}, Python {sys.version}, {platform.platform()}",
        f"arguments: {words!r}"[:10_000],
        "".join(traceback.format_exception(error)),
    ])  # fmt: skip
    for folder in (cache_folder, private_folder):
        with contextlib.suppress(OSError, UsageError):
            file = folder() / "bugs" / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            write_cached(file, content.encode(errors="backslashreplace"))
            return f"please report it with {file}"
    return "please report it with what --debug shows"


def finish_output() -> None:
    """Write what was printed. Raises BrokenPipeError, and UsageError where a disk is full."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise UsageError(f"cannot write to standard output: {error.strerror}") from None


def drop_output() -> None:
    """Have Python say nothing at its end of an output that nobody takes."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_flags(error: GroundedDiffusionError, flags: Mapping[str, str]) -> str:
    """An error's line with options in place of fields: "min_area is over ..." -> "--min-area is over ...".

    Where a field is in backquotes, because its name is a word of the line as well, only that place is meant.
    """
    line = error.message if isinstance(error, BadPrompts) else str(error)
    for field in getattr(error, "fields", ()):
        place = f"`{field}`" if f"`{field}`" in line else rf"(?<![\w-]){field}(?!\w)"
        line = re.sub(place, flags.get(field, f"--{field.replace('_', '-')}"), line)
    return line
