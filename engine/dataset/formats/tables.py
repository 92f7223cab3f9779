"""Files that describe a whole data set, written row by row: lists of lines, and JSON objects with long lists; and texts
in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, BinaryIO

from grounded_diffusion.engine.dataset.record import SPLITS
from grounded_diffusion.engine.dataset.storage.base import Storage

Entries = Iterable[tuple[str, Any]]  # (split, entry)


def write_lines(storage: Storage, lines: Entries, path: Callable[[str], str]) -> dict[str, int]:
    """Text files by split; returns their lengths. `lines` gives (split, line) pairs."""
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for split, line in lines:
            if split not in streams:
                streams[split] = stack.enter_context(storage.create(path(split)))
            streams[split].write(line.encode() + b"\n")
            counts[split] = counts.get(split, 0) + 1
    return counts


def write_tables(storage: Storage, head: dict[str, Any], lists: dict[str, Entries], path: Callable[[str], str]) -> None:
    """JSON objects by split: the fields of `head`, then each list. A split that the first list does not have gets no
    file; without any, the first split's is empty."""
    with ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}

        def open_table(split: str) -> None:
            streams[split] = stack.enter_context(storage.create(path(split)))
            streams[split].write(to_json(head)[:-1])

        for number, (name, entries) in enumerate(lists.items()):
            begun: set[str] = set()
            for split, entry in entries:
                if number == 0 and split not in streams:
                    open_table(split)
                streams[split].write((b",\n" if split in begun else list_head(name)) + to_json(entry))
                begun.add(split)
            if not streams:
                open_table(SPLITS[0])
            for split, stream in streams.items():
                stream.write(b"\n]" if split in begun else list_head(name) + b"]")
        for stream in streams.values():
            stream.write(b"}\n")


def list_head(name: str) -> bytes:
    """The beginning of a list, after the fields before it."""
    return b", " + to_json(name) + b": [\n"


def to_json(value: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode()


def count_splits(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Samples of each split that has any, in the splits' order; the first split without any rows."""
    counts = dict.fromkeys(SPLITS, 0)
    for row in rows:
        counts[row["split"]] += 1
    return {split: count for split, count in counts.items() if count} or {SPLITS[0]: 0}


# What YAML 1.1 takes as it stands within double quotes on one line; the rest is escaped.
YAML_ODD = re.compile(r'[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]|["\\]')


def yaml_string(text: str, ascii: bool = False) -> str:
    """A text as YAML takes it, in double quotes. Unlike JSON's, it may hold no U+007F, and no pairs of surrogates."""
    odd = re.compile(r'[^\x20-\x7e]|["\\]') if ascii else YAML_ODD

    def escape(match: re.Match) -> str:
        character, code = match[0], ord(match[0])
        if character in '"\\':
            return f"\\{character}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return f'"{odd.sub(escape, text)}"'
