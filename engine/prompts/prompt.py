"""A prompt: the objects to mask in brackets, or a JSON line that says more. A prompt file has one a line.

    # a comment
    a photograph of a [dog] and a [cat]
    {"prompt": "a busy street", "objects": ["car", "traffic light"], "seed": 3, "count": 4, "negative_prompt": "snow"}

Everything is checked before anything is generated; every error names the file and the line (`file.PromptFile`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from grounded_diffusion.engine.checks import check_int
from grounded_diffusion.engine.sampling.noise import MAX_SEED
from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import Misfit, load_json

MAX_NAME = 64  # characters of an object's name; it becomes part of file names
MAX_OBJECTS = 254  # labels are bytes; 0 is the background, 255 void
MAX_COUNT = 1_000_000
FORBIDDEN = '/\\:*?"<>|'  # what some file system cannot have in a name
JSON_FIELDS = ("prompt", "objects", "seed", "count", "negative_prompt")  # the last three as Prompt has them
HOW_TO_MARK = "mark objects with brackets, as in: a photograph of a [dog] and a [cat]"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to draw and which objects to mask.

    Attributes:
        text: the prompt as the text encoder sees it, without brackets.
        objects: names to mask, in order; they need not occur in the text.
        seed: seed of this prompt's images instead of the data set's; None takes the data set's.
        count: images of this prompt; None takes the run's images per prompt.
        negative_prompt: what not to draw; None takes the run's, "" has none.

    Raises:
        UsageError: a field that cannot be used, at construction.
    """

    text: str
    objects: tuple[str, ...]
    seed: int | None = None
    count: int | None = None
    negative_prompt: str | None = None

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise UsageError("the prompt has no text")
        if isinstance(self.objects, str) or not all(isinstance(name, str) for name in self.objects):
            raise UsageError(f"objects must be a list of names, not {self.objects!r}")
        object.__setattr__(self, "text", clean(self.text, "the prompt"))
        object.__setattr__(self, "negative_prompt", clean_negative(self.negative_prompt))
        object.__setattr__(self, "objects", tuple(check_name(name) for name in self.objects))
        if not self.objects:
            raise UsageError(f"the prompt names no objects; {HOW_TO_MARK}")
        if len(self.objects) > MAX_OBJECTS:
            raise UsageError(f"the prompt has {len(self.objects)} objects, at most {MAX_OBJECTS} fit")
        seen: set[str] = set()
        for name in self.objects:
            if name.casefold() in seen:
                raise UsageError(f"object {name!r} is named twice; one mask covers all of a kind, so name it once")
            seen.add(name.casefold())
        if self.seed is not None:
            check_int(self.seed, "seed", 0, MAX_SEED)
        if self.count is not None:
            check_int(self.count, "count", 1, MAX_COUNT)


def clean(text: str, what: str) -> str:
    """`text` with single spaces. Raises UsageError for control characters and lone surrogates."""
    text = " ".join(text.split())
    for character in "" if text.isprintable() else text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise UsageError(f"{what} contains the control character U+{ord(character):04X}; remove it")
    return text


def clean_negative(text: object) -> str | None:
    """A negative prompt with single spaces. Raises UsageError where it is no text."""
    if text is not None and not isinstance(text, str):
        raise UsageError(f"negative_prompt must be a text, not {text!r}")
    return text if text is None else clean(text, "the negative prompt")


def tidy(name: str) -> str:
    """A name with single spaces, composed: however "\N{LATIN SMALL LETTER E WITH ACUTE}" is typed, it is one name."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def check_name(name: str) -> str:
    """An object's name, tidy. Raises UsageError where it cannot be part of a file name."""
    shown = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    name = tidy(clean(name, f"object name {shown!r}"))
    if not name:
        raise UsageError(f"an object has an empty name; {HOW_TO_MARK}")
    if len(name) > MAX_NAME:
        raise UsageError(f"object name {shown!r} has {len(name)} characters, at most {MAX_NAME} are allowed")
    if bad := sorted(set(name) & set(FORBIDDEN)):
        raise UsageError(f"object name {name!r} contains {' '.join(bad)}, which cannot be part of a file name")
    if name.startswith(".") or not name.isprintable():
        raise UsageError(f"object name {name!r} starts with a dot or contains an invisible character")
    return name


def split_brackets(text: str) -> tuple[str, tuple[str, ...]]:
    """("a [dog] and", ...) -> ("a dog and", ("dog",)). Raises UsageError for brackets that do not pair up."""
    pieces, names, rest = [], [], text
    while rest:
        before, opened, rest = rest.partition("[")
        if "]" in before:
            raise UsageError(f"a ] without its [ after {before[: before.index(']')].strip()!r}; {HOW_TO_MARK}")
        pieces.append(before)
        if not opened:
            break
        name, closed, rest = rest.partition("]")
        if not closed or "[" in name:
            raise UsageError(f"the bracket before {name.split('[')[0].strip()!r} is not closed; {HOW_TO_MARK}")
        pieces.append(name)
        if " ".join(name.split()).casefold() not in {" ".join(known.split()).casefold() for known in names}:
            names.append(name)  # two marks of one name are one object: its mask covers all of a kind
    return "".join(pieces), tuple(names)


def parse_json(line: str) -> Prompt:
    """A prompt from a JSON object with `prompt`, and optionally `objects`, `seed`, `count`, `negative_prompt`."""
    try:
        fields = load_json(line.encode(errors="surrogatepass"))
    except Misfit as error:
        raise UsageError(str(error)) from None
    if unknown := sorted(fields.keys() - set(JSON_FIELDS)):
        raise UsageError(f"unknown field {', '.join(unknown)}; known are {', '.join(JSON_FIELDS)}")
    text, objects = fields.get("prompt"), fields.get("objects", [])
    if not isinstance(text, str):
        raise UsageError('the JSON line has no "prompt" with a text')
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise UsageError(f'"objects" must be a list of names, not {objects!r}')
    text, marked = split_brackets(text)
    return Prompt(text, (*marked, *objects), *(fields.get(name) for name in JSON_FIELDS[2:]))


def parse_prompt(line: str) -> Prompt:
    """A prompt from one line of either form. Raises UsageError."""
    line = line.strip()
    return parse_json(line) if line.startswith("{") else Prompt(*split_brackets(line))


def parse_line(raw: bytes, where: str) -> Prompt:
    """A prompt from a line of a file. Raises UsageError that begins with `where`."""
    try:
        if b"\0" in raw:
            raise UsageError("contains a NUL byte, so this is not a text file (or UTF-16; save as UTF-8)")
        return parse_prompt(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from None
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def to_line(prompt: Prompt) -> str:
    """A prompt as a JSON line that `parse_prompt` reads back. Raises UsageError where its text has brackets."""
    if set(prompt.text) & set("[]"):
        raise UsageError(f"the prompt {prompt.text!r} has brackets, which would mark objects; leave them out")
    values = (prompt.text, list(prompt.objects), prompt.seed, prompt.count, prompt.negative_prompt)
    fields = dict(zip(JSON_FIELDS, values, strict=True))
    return json.dumps({name: value for name, value in fields.items() if value is not None}, ensure_ascii=False)


def as_prompts(prompts: str | Prompt | Iterable[str | Prompt]) -> list[Prompt]:
    """Prompts from what a caller passes: bracketed strings, JSON lines, Prompt objects. Raises UsageError."""
    if isinstance(prompts, str | Prompt):
        prompts = [prompts]
    result = []
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str | Prompt):
            raise UsageError(f"prompt {number} must be a string or a Prompt, not {type(prompt).__name__}")
        try:
            result.append(prompt if isinstance(prompt, Prompt) else parse_prompt(prompt))
        except UsageError as error:
            raise UsageError(f"prompt {number}: {error}") from None
    if not result:
        raise UsageError(f"there are no prompts; {HOW_TO_MARK}")
    return result
