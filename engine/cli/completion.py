"""--print-completion: what a shell reads to complete a command's options, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from grounded_diffusion.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")
FILES, FOLDERS = ("FILE", "NAMES", "FILE.svg"), ("DIR", "SRC", "BUNDLE")  # metavars of what lies on a disk


class PrintCompletion(argparse.Action):
    """Prints the script of a shell and ends the command."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            line = "completion needs shtab; install it with: pip install 'grounded-diffusion[completion]'"
            raise UsageError(line) from None
        mark_paths(parser, shtab)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def add_completion_option(parser: argparse.ArgumentParser) -> None:
    """--print-completion."""
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=SHELLS, metavar="SHELL",
        help="print what a shell (%(choices)s) needs to complete these options, and end",
    )  # fmt: skip


def mark_paths(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Have files and folders completed where an option takes one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                mark_paths(command, shtab)
        elif action.metavar in FILES:
            action.complete = shtab.FILE  # ty: ignore[invalid-assignment]
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # ty: ignore[invalid-assignment]
