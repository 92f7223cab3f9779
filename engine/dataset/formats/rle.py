"""COCO's run-length code of a mask, in its compressed form."""

from __future__ import annotations

import numpy as np


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a bool mask [H,W] down its columns; the first run is of zeros and may be empty."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(edges, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


def compress(runs: list[int]) -> str:
    """Run lengths as the string of cocoapi's `rleToString`.

    From the fourth on, a run is stored as its difference from the one two before. Numbers are written in groups of
    five bits, lowest first, in characters from "0" on; the sixth bit says that more follow, the fifth of the last
    group is the sign.
    """
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group, value = value & 0x1F, value >> 5
            more = value != (-1 if group & 0x10 else 0)
            text.append(chr(48 + (group | 0x20 if more else group)))
            if not more:
                break
    return "".join(text)


def encode_rle(mask: np.ndarray) -> dict:
    """A bool mask [H,W] as COCO's `{"size": [h, w], "counts": str}`."""
    return {"size": list(mask.shape), "counts": compress(run_lengths(mask))}
