"""The one way from bytes on disk to values: decoded, checked against a type, and told in one line where that fails.

The types are dataclasses and msgspec's structs that say which fields there are and what each holds. What does not fit
raises `Misfit`, which knows the line and the field; whoever reads the file adds its name and the way to repair it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from grounded_diffusion.errors import UsageError

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]  # of what there is at least one of, such as pixels of a side
Number = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # an index, an area or a seed
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

MAX_FILE = 1 << 26  # bytes
LONGEST = 200  # characters of what is told
WORDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list",
         "object": "a table of fields", "null": "null"}  # fmt: skip


class Misfit(ValueError):  # noqa: N818 - of a text to a type
    """What does not fit. Its text names the field, as in objects[0].label, and what was expected.

    Args:
        told: the text.
        line: of the content, from 1; None where it is not known.
    """

    def __init__(self, told: str, line: int | None = None):
        super().__init__(told if len(told) <= LONGEST else f"{told[: LONGEST - 3]}...")
        self.line = line

    def at(self, file: object) -> str:
        """The text behind the file's name and the line: "run.json:3: format must be a text, not a list"."""
        return f"{file}{'' if self.line is None else f':{self.line}'}: {self}"


@contextmanager
def settings_errors(path: object, what: str) -> Iterator[None]:
    """Errors of reading a file of settings, `what`, as UsageError with the file's name."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from None
    except Misfit as error:
        raise UsageError(error.at(path)) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_file(path: str | Path) -> bytes:
    """A file that people write, or one that says what others are. Raises OSError, and Misfit over MAX_FILE bytes."""
    with Path(path).open("rb") as stream:
        content = stream.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise Misfit(f"it has over {MAX_FILE:,} bytes, which no such file has")
    return content


def as_type(value: Any, kind: type[T], content: bytes = b"", name: str = "") -> T:
    """Decoded content as a type; for a dataclass also without fields that it does not have.

    Args:
        content: what the value was decoded from, in which the field's line is looked for.
        name: of the value, where it is a field itself.

    Raises:
        Misfit: a field that is missing, unknown or of another type. What the type's own checks raise passes through.
    """
    if is_dataclass(kind) and isinstance(value, dict):
        known = {field.name for field in fields(kind)}
        if unknown := sorted(str(name) for name in value.keys() - known):
            raise Misfit(f"unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        told, field = in_words(str(error), name)
        raise Misfit(told, line_of(content, field)) from None
    except RecursionError:
        raise Misfit("nested too deeply") from None


def decode(content: bytes, kind: type[T]) -> T:
    """A JSON file as a type. Raises Misfit as `as_type`, and for what `load_json` refuses."""
    return as_type(load_json(content), kind, content)


def load_json(content: bytes) -> Any:
    """JSON in UTF-8, as Python's module writes it. Raises Misfit, also for a field that is given twice."""
    try:
        return json.loads(as_text(content), object_pairs_hook=once)
    except Twice as error:
        raise Misfit(f"{error} is given twice", line_of(content, str(error), last=True)) from None
    except Misfit:
        raise
    except json.JSONDecodeError as error:
        raise Misfit(f"invalid JSON at column {error.colno}: {error.msg}", error.lineno) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise Misfit(f"invalid JSON: {what}") from None


def load_toml(content: bytes) -> dict[str, Any]:
    """TOML in UTF-8. Raises Misfit."""
    try:
        return tomllib.loads(as_text(content).replace("\r\n", "\n"))
    except Misfit:
        raise
    except (ValueError, RecursionError) as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), (column \d+)\)", str(error), re.DOTALL)
        told = f"{found[1]} at {found[3]}" if found else str(error)
        raise Misfit(f"this is not TOML: {told}", int(found[2]) if found else None) from None


def as_text(content: bytes) -> str:
    """A text in UTF-8. Raises Misfit."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Misfit(f"not UTF-8 (byte 0x{content[error.start]:02x}); save it as UTF-8", line) from None


class Lines(Generic[T]):
    """JSON lines of one type, a few million a second.

    A struct's fields are counted against the colons outside of its texts, which tells a field that is given twice
    without a second pass: only a line whose numbers differ, or that does not fit, is gone through slowly.

    Args:
        kind: a struct.
        colons: from a value to how many fields it was written with, and how many colons are in its texts, together.
    """

    def __init__(self, kind: type[T], colons: Callable[[T], int]):
        self.kind, self.colons = kind, colons
        self.quick = msgspec.json.Decoder(kind).decode

    def __call__(self, line: bytes) -> T:
        """A line as the type. Raises Misfit, without a line number."""
        try:
            value = self.quick(line)
            if line.count(b":") == self.colons(value) and b"\\u" not in line:
                return value
        except (msgspec.MsgspecError, ValueError, RecursionError):
            pass
        try:
            return decode(line, self.kind)
        except Misfit as error:
            raise Misfit(str(error)) from None


class Twice(Exception):  # noqa: N818 - a name, for `load_json`
    """The name of a field that is given twice."""


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises Twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise Twice(next(name for name in names if names.count(name) > 1))
    return result


def in_words(told: str, above: str = "") -> tuple[str, str]:
    """msgspec's line in our words, and the field: ("label must be a whole number, not a text", "label")."""
    found = re.fullmatch(r"(.*?)(?: - at (?:`key` in )?`\$?\.?([^`]*)`)?", told, re.DOTALL)
    problem, field = (found[1], found[2] or "") if found else (told, "")
    field = f"{above}{'' if field.startswith('[') else '.'}{field}".strip(".")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        field = f"{field}.{missing[1]}".lstrip(".")
        return f"{field} is missing", field
    name = field or "it"
    if wrong := re.fullmatch(r"Expected (.*?)(?:, got (.*))?", problem):
        got = f", not {type_words(wrong[2])}" if wrong[2] else ""
        return f"{name} must be {type_words(wrong[1])}{got}".replace(" 0.0", " 0").replace(" 1.0", " 1"), field
    if choice := re.fullmatch(r"Invalid enum value (.*)", problem, re.DOTALL):
        return f"{name} is {choice[1]}, which is none of its values", field
    return (f"{field}: {problem}" if field else problem), field


def type_words(text: str) -> str:
    """ "`int | null`" -> "a whole number or null", "`int` >= 0" -> "a whole number >= 0"."""
    words = lambda match: " or ".join(WORDS.get(name, name) for name in match[1].split(" | "))
    return re.sub(r"`([^`]*)`", words, text)


def line_of(content: bytes, field: str, last: bool = False) -> int | None:
    """The line of a JSON or TOML text on which a field is set; None where the text does not tell.

    Args:
        last: the last of several lines; otherwise a field that is set more than once has none.
    """
    name = re.sub(r"\[[^\]]*\]", "", field).rpartition(".")[2]
    if not name:
        return None
    bare = re.escape(name.encode(errors="replace"))
    found = list(re.finditer(rb'"%b"\s*:|^[ \t]*%b[ \t]*=' % (bare, bare), content, re.MULTILINE))
    if not found or (len(found) > 1 and not last):
        return None
    return content.count(b"\n", 0, found[-1].end()) + 1
