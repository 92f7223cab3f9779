"""Checking a folder data set: every file against its record, every record against its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset import check_row, read_array, read_splits
from grounded_diffusion.engine.formats.common import mask_box
from grounded_diffusion.engine.writer import FOLDERS, JOURNAL, METADATA, RUN, record_files
from grounded_diffusion.errors import UsageError


def verify(path: str | Path) -> Iterator[str]:
    """Problems of a folder data set, each in one line that names the file. Yields nothing when all is well."""
    path = Path(path)
    if (path / JOURNAL).is_file():
        yield f"{path / JOURNAL}: the run is not finished; the same gd-infer command with --resume finishes it"
    try:
        if not isinstance(json.loads((path / RUN).read_text(encoding="utf-8"))["settings"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{path / RUN}: missing or damaged"
    rows: list[dict[str, Any]] = []
    yield from verify_metadata(path / METADATA, rows)
    if not rows:
        return
    try:
        read_splits(path, [row["id"] for row in rows])
    except UsageError as error:
        yield str(error)
    for row in rows:
        yield from verify_row(path, row)
    known = {file for row in rows for file in record_files(row)}
    for folder in FOLDERS:
        for file in sorted((path / folder).glob("*")):
            if f"{folder}/{file.name}" not in known:
                yield f"{file}: belongs to no record"


def verify_metadata(file: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Problems of metadata.jsonl; its usable records are appended to `rows`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"
        return
    if not lines:
        yield f"{file}: has no records"
    ids: dict[str, int] = {}
    used: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_row(row)
        except (ValueError, RecursionError) as error:
            yield f"{file}:{number}: {error}"
            continue
        if row["id"] in ids:
            yield f"{file}:{number}: the id {row['id']} is that of line {ids[row['id']]} too"
            continue
        if f"{row['index']:06d}" != row["id"]:
            yield f"{file}:{number}: the id {row['id']} does not belong to index {row['index']}"
        for name in record_files(row):
            if name in used:
                yield f"{file}:{number}: the file {name} is used twice, first by {used[name]}"
            used[name] = row["id"]
        ids[row["id"]] = number
        rows.append(row)


def verify_row(path: Path, row: dict[str, Any]) -> Iterator[str]:
    """Problems of one record's files."""
    size = row["height"], row["width"]
    arrays: dict[str, np.ndarray] = {}
    expected = {row["image"]: ("RGB",), row["mask"]: ("P", "L"), **{o["mask"]: ("1", "L") for o in row["objects"]}}
    for file, modes in expected.items():
        try:
            arrays[file] = read_array(path / file, modes, size)
        except UsageError as error:
            yield str(error)
    labels, union = arrays.get(row["mask"]), np.zeros(size, np.bool_)
    for thing in row["objects"]:
        if thing["mask"] not in arrays:
            labels = None
            continue
        file, mask = path / thing["mask"], arrays[thing["mask"]] > 0
        union |= mask
        if int(mask.sum()) != thing["area"]:
            yield f"{file}: {int(mask.sum())} pixels, the record of {row['id']} says {thing['area']}"
        if mask_box(mask) != thing["box"]:
            yield f"{file}: its box is {mask_box(mask)}, the record of {row['id']} says {thing['box']}"
        if labels is not None and (stray := int((~mask & (labels == thing["label"])).sum())):
            yield f"{path / row['mask']}: {stray} pixels of {thing['name']!r} lie outside {thing['mask']}"
    if labels is None:
        return
    if int(labels.max()) > len(row["objects"]):
        yield f"{path / row['mask']}: has the label {int(labels.max())}, the record has {len(row['objects'])} objects"
    if lost := int((union & (labels == 0)).sum()):
        yield f"{path / row['mask']}: {lost} pixels of the objects' masks are background"
