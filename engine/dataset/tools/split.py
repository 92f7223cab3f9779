"""Train and val lists of a data set."""

from __future__ import annotations

import hashlib

import numpy as np

from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import SPLITS, sample_id
from grounded_diffusion.engine.dataset.shards import Recording, note_files
from grounded_diffusion.errors import UsageError


def in_val(id: str, share: float) -> bool:
    """Whether a sample belongs to val: its id's hash decides, so a data set that grows keeps its split."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") < share * 2**64


def split(data: FolderDataset, share: float) -> dict[str, int]:
    """Write train.txt and val.txt into the data set; returns their lengths. Raises UsageError for an empty one."""
    if not 0 < share < 1:
        raise UsageError(f"val must lie between 0 and 1, not {share:g}", "val")
    ids = map(sample_id, data.indices.tolist())
    val = np.fromiter((in_val(id, share) for id in ids), np.bool_, len(data))
    counts = {SPLITS[0]: len(data) - int(val.sum()), SPLITS[1]: int(val.sum())}
    for name, count in counts.items():
        if not count:
            line = f"{name} would be empty with `val` {share:g} of {len(data)} images; choose another share"
            raise UsageError(line, "val")
    storage = Recording(data.storage)
    for name, indices in zip(SPLITS, (data.indices[~val], data.indices[val]), strict=True):
        storage.put(f"{name}.txt", "".join(f"{sample_id(index)}\n" for index in indices.tolist()).encode())
    note_files(storage)
    storage.clean()
    return counts
