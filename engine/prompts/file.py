"""A prompt file of any length, read when its prompts are needed: ten million of them take no memory to speak of."""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from grounded_diffusion.engine.prompts.prompt import HOW_TO_MARK, Prompt, parse_line
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import lines_of, read_stream

STRIDE = 64  # prompts from one remembered place to the next
BOM = b"\xef\xbb\xbf"


class PromptFile:
    """The prompts of a file, then those of the command line. Only every STRIDE-th place in it is kept in memory.

    Args:
        path: the file, or None.
        texts: more prompts, one a string, in either of the forms that a line has.
        images: of each prompt that does not say its own count.

    Attributes:
        prompts, samples: how many there are.
        digest: SHA-256 of the lines that count: not of comments, empty lines and line ends.

    Raises:
        UsageError: the file cannot be read, has no prompts, or a count in it is wrong.
    """

    def __init__(self, path: str | Path | None, texts: Sequence[str] = (), images: int = 1):
        self.path, self.images = None if path is None else Path(path), images
        self.name = "prompt" if path is None else str(path)
        self.texts = [" ".join(text.split()).encode(errors="surrogatepass") for text in texts]
        self._content: bytes | None = None  # of what cannot be read twice, such as a pipe
        self._stat: tuple[int, int, int] | None = None
        self.prompts = self.samples = 0
        self._places, self._firsts = array("q"), array("q")  # where a line begins; index of its first sample
        digest = hashlib.sha256()
        for place, number, line in self._lines():
            if self.prompts % STRIDE == 0:
                self._places.append(place)
                self._firsts.append(self.samples)
            digest.update(line + b"\n")
            self.prompts += 1
            self.samples += self._count(line, number)
        self.digest = digest.hexdigest()
        if not self.prompts and path is not None:
            raise UsageError(f"{path} has no prompts; write one a line, {HOW_TO_MARK}")
        if not self.prompts:
            raise UsageError("no prompts; give `prompt_file` or `prompts`", "prompt_file", "prompts")

    def __iter__(self) -> Iterator[tuple[int, Prompt]]:
        """(images to make, prompt) in order. Raises UsageError, with file and line, for one that cannot be used."""
        for _, number, line in self._lines():
            prompt = parse_line(line, self._where(number))
            yield prompt.count or self.images, prompt

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
                    if line and not line.startswith(b"#"):
                        yield place, number, line
                    place += len(raw)
        for k, text in enumerate(self.texts, 1):
            if k >= -place:
                yield -k, -k, text

    def _open(self, path: Path) -> BinaryIO:
        """The file from its beginning. Raises UsageError, also where it is not the one that was first read."""
        if self._content is not None:
            return io.BytesIO(self._content)
        try:
            stream = path.open("rb")
            if not path.is_file():
                with stream:
                    self._content = read_stream(stream, self.name)
                return io.BytesIO(self._content)
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


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file. Raises UsageError, with file and line, at the first one that cannot be used."""
    return [prompt for _, prompt in PromptFile(path)]
