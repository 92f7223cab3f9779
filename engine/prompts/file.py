"""A prompt file of any length, read when its prompts are needed: ten million of them take no memory to speak of."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from grounded_diffusion.engine.prompts.prompt import HOW_TO_MARK, Prompt, parse_line
from grounded_diffusion.errors import BadPrompts, UsageError
from grounded_diffusion.files import lines_of, read_stream

STANDARD_INPUT = Path("-")
STRIDE = 64  # prompts from one remembered place to the next
SHOWN = 20  # lines that cannot be used and are shown
BOM = b"\xef\xbb\xbf"


class PromptFile:
    """The prompts of a file, then those of the command line. Only every STRIDE-th place in it is kept in memory.

    Args:
        path: the file, "-" for standard input, or None.
        texts: more prompts, one a string, in either of the forms that a line has.
        images: of each prompt that does not say its own count.
        skip_bad: leave out lines of the file that cannot be used, and say which in `skipped`.
        check: with `skip_bad`, raises UsageError for further prompts that cannot be used.
        content: of standard input, where it has been read.

    Attributes:
        prompts, samples: how many there are.
        skipped: what is wrong with the lines left out, with file and line.
        content: of what cannot be read twice, such as standard input; None of other files.
        digest: SHA-256 of the lines that count: not of comments, empty lines and line ends.

    Raises:
        UsageError: the file cannot be read, has no prompts, or a count in it is wrong; then it tells all lines that
            cannot be used.
    """

    def __init__(
        self,
        path: str | Path | None,
        texts: Sequence[str] = (),
        images: int = 1,
        skip_bad: bool = False,
        check: Callable[[Prompt], object] = lambda prompt: None,
        content: bytes | None = None,
    ):
        self.path, self.images = None if path is None else Path(path), images
        self.name = "prompt" if path is None else str(path)
        self.texts = [" ".join(text.split()).encode(errors="surrogatepass") for text in texts]
        self._bad: set[int] = set()  # places of lines that are left out
        self.skipped: list[str] = []
        self.content = content
        if self.path == STANDARD_INPUT:
            self.name = "standard input"
            self.content = read_standard_input() if content is None else content
        self._stat: tuple[int, int, int] | None = None
        self.prompts = self.samples = 0
        self._places, self._firsts = array("q"), array("q")  # where a line begins; index of its first sample
        digest = hashlib.sha256()
        for place, number, line in self._lines():
            if skip_bad and place >= 0 and not self._usable(place, number, line, check):
                continue
            if self.prompts % STRIDE == 0:
                self._places.append(place)
                self._firsts.append(self.samples)
            digest.update(line + b"\n")
            self.prompts += 1
            try:
                self.samples += self._count(line, number)
            except UsageError:
                raise self.refusal() from None
        self.digest = digest.hexdigest()
        if not self.prompts and path is not None:
            bad = f" that can be used; {self.skipped[0]}" if self.skipped else f"; write one a line, {HOW_TO_MARK}"
            raise UsageError(f"{self.name} has no prompts{bad}")
        if not self.prompts:
            raise UsageError("no prompts; give `prompt_file` or `prompts`", "prompt_file", "prompts")

    def __iter__(self) -> Iterator[tuple[int, Prompt]]:
        """(images to make, prompt) in order. Raises UsageError, with file and line, for those that cannot be used."""
        for _, number, line in self._lines():
            try:
                prompt = parse_line(line, self._where(number))
            except UsageError:
                raise self.refusal() from None
            yield prompt.count or self.images, prompt

    def refusal(self) -> UsageError:
        """What to say of lines that cannot be used: of all of them."""
        found: list[UsageError] = []
        count = 0
        for _, number, line in self._lines():
            try:
                parse_line(line, self._where(number))
            except UsageError as error:
                count += 1
                if len(found) < SHOWN:
                    found.append(error)
        return all_of(found, count)

    def between(self, start: int, stop: int) -> Iterator[tuple[int, Prompt, int]]:
        """(sample's index, prompt, which of the prompt's images) of the samples start to stop - 1.

        Raises UsageError where the file has changed since it was first read.
        """
        at = bisect_right(self._firsts, start) - 1
        first = self._firsts[at]
        for _, number, line in self._lines(self._places[at]):
            count = self._count(line, number)
            if first + count > start:
                prompt = parse_line(line, self._where(number))
                for index in range(max(first, start), min(first + count, stop)):
                    yield index, prompt, index - first
            first += count
            if first >= stop:
                return

    def _usable(self, place: int, number: int, line: bytes, check: Callable[[Prompt], object]) -> bool:
        """Whether a line can be used; one that cannot is noted."""
        where = self._where(number)
        try:
            prompt = parse_line(line, where)
            try:
                check(prompt)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
        except UsageError as error:
            self._bad.add(place)
            self.skipped.append(str(error))
            return False
        return True

    def _where(self, number: int) -> str:
        return f"{self.name}{':' if self.path else ' '}{number}" if number > 0 else f"prompt {-number}"

    def _count(self, line: bytes, number: int) -> int:
        """Images of a line. It is parsed only if it can say so, which makes this fast for long files."""
        if line.startswith(b"{") and (b'"count"' in line or b"\\u" in line):
            return parse_line(line, self._where(number)).count or self.images
        return self.images

    def _lines(self, place: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """(place, line number, line) of what is a prompt, from a place on; the numbers only hold from the beginning.

        Places and numbers of the command line's prompts are negative, from -1.
        """
        if self.path is not None and place >= 0:
            with self._open(self.path) as stream:
                stream.seek(place)
                for number, raw in enumerate(lines_of(stream, self.name), 1):
                    line = (raw.removeprefix(BOM) if place == 0 else raw).strip()
                    if line and not line.startswith(b"#") and place not in self._bad:
                        yield place, number, line
                    place += len(raw)
        for k, text in enumerate(self.texts, 1):
            if k >= -place:
                yield -k, -k, text

    def _open(self, path: Path) -> BinaryIO:
        """The file from its beginning. Raises UsageError, also where it is not the one that was first read."""
        if self.content is not None:
            return io.BytesIO(self.content)
        try:
            stream = path.open("rb")
            if not path.is_file():
                with stream:
                    self.content = read_stream(stream, self.name)
                return io.BytesIO(self.content)
        except FileNotFoundError:
            raise UsageError(f"there is no prompt file {path}") from None
        except OSError as error:
            raise UsageError(f"cannot read the prompt file {path}: {error.strerror}") from None
        status = os.fstat(stream.fileno())
        stat = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._stat not in (None, stat):
            stream.close()
            raise UsageError(f"{path} has changed during the run; restore it, and give the same command again")
        self._stat = stat
        return stream


def read_standard_input() -> bytes:
    """All of it. Raises UsageError where it is closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; give `prompt_file` a file", "prompt_file")
    return read_stream(sys.stdin.buffer, "standard input")


def all_of(problems: Sequence[UsageError], count: int) -> UsageError:
    """One error for all problems; the first SHOWN of `count` are at hand."""
    if count == 1:
        return problems[0]
    more = f", of which {len(problems)} are shown" if len(problems) < count else ""
    return BadPrompts(f"{count} prompts cannot be used{more}; repair them all, then give the same command", problems)


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file. Raises UsageError that has all that cannot be used, with file and line."""
    return [prompt for _, prompt in PromptFile(path)]
