"""Train and val lists of a data set."""

from __future__ import annotations

import numpy as np

from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import SPLITS, sample_id
from grounded_diffusion.engine.dataset.shards import Recording, note_files
from grounded_diffusion.engine.dataset.splits import Splitter
from grounded_diffusion.errors import UsageError


def split(data: FolderDataset, share: float) -> dict[str, int]:
    """Write train.txt and val.txt into the data set; returns their lengths. Raises UsageError for an empty one."""
    if not 0 < share < 1:
        raise UsageError(f"val must lie between 0 and 1, not {share:g}", "val")
    splitter = Splitter(share)
    rows = ((row["index"], [thing["name"] for thing in row["objects"]]) for row in data.rows())
    val = np.fromiter((splitter.in_val(*row) for row in rows), np.bool_, len(data))
    counts = {SPLITS[0]: len(data) - int(val.sum()), SPLITS[1]: int(val.sum())}
    for name, count in counts.items():
        if not count:
            fits = f"from {1 / len(data):.2g} to {1 - 1 / len(data):.2g}" if len(data) > 2 else "for more images"
            line = f"{name} would be empty with `val` {share:g} of {len(data)} images; choose a share {fits}"
            raise UsageError(line, "val")
    storage = Recording(data.storage)
    for name, indices in zip(SPLITS, (data.indices[~val], data.indices[val]), strict=True):
        storage.put(f"{name}.txt", "".join(f"{sample_id(index)}\n" for index in indices.tolist()).encode())
    note_files(storage)
    storage.clean()
    return counts
