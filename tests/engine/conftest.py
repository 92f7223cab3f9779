"""A small folder data set with awkward masks, for the tests of gd-dataset."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True, slots=True)
class Blobs:
    """Nine samples, the last three of them in val. `path` is shared: do not write to it."""

    path: Path
    names = ("cat", "dog", "tv monitor")
    height, width = 40, 56
    count = 9

    def sample(self, index):
        """Blobs with holes and several pieces, which overlap; the last object is empty in every third sample."""
        from helpers import samples

        rng = np.random.default_rng(index)
        size, names, masks = (self.height, self.width), self.names[index % 2 :], {}
        for k, name in enumerate(names):
            coarse = rng.random((self.height // 4, self.width // 4)) > 0.55 + 0.1 * k
            masks[name] = coarse.repeat(4, 0).repeat(4, 1) ^ (rng.random(size) > 0.98)
            if name == "tv monitor" and index % 3 == 0:
                masks[name][:] = False
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        return samples.sample(index, image, masks, f"{' and '.join(names)}, n° {index}", seed=2**62)

    def class_map(self, index):
        """Class ids uint8 [H,W] that a sample must have."""
        sample = self.sample(index)
        ids = [0, *(self.names.index(name) + 1 for name in sample.names)]
        return np.array(ids, np.uint8)[sample.labels]

    def split(self, index):
        return "train" if index < 6 else "val"

    def write(self, path, indices):
        """Write samples, numbered anew, as a folder data set without split lists, four to a shard."""
        import json

        from grounded_diffusion.engine.dataset.formats.common import Settings
        from grounded_diffusion.engine.dataset.formats.folder import FolderFormat
        from grounded_diffusion.engine.dataset.record import Record
        from grounded_diffusion.engine.dataset.shards import write_shards
        from grounded_diffusion.engine.dataset.storage.open import open_storage

        storage, format, settings = open_storage(path), FolderFormat(Settings()), {"seed": 7}
        storage.put("run.json", json.dumps({"format": "folder", "settings": settings}).encode())
        records = [Record.from_sample(replace(self.sample(index), index=k)) for k, index in enumerate(indices)]
        write_shards(storage, format, [(len(records), records)], format.encode, 4, settings)
        return path

    def convert(self, out, format, *options):
        """Convert the shared data set through the command line."""
        from grounded_diffusion.engine.cli.dataset import main

        assert main(["convert", str(self.path), "--format", format, "--out", str(out), *map(str, options)]) == 0
        return out


@pytest.fixture(scope="session")
def blobs(tmp_path_factory):
    blobs = Blobs(tmp_path_factory.mktemp("blobs") / "data")
    blobs.write(blobs.path, range(blobs.count))
    ids = [f"{index:06d}" for index in range(blobs.count)]
    (blobs.path / "train.txt").write_text("\n".join(ids[:6]))
    (blobs.path / "val.txt").write_text("\n".join(ids[6:]))
    return blobs


@pytest.fixture
def data(blobs, tmp_path):
    """A copy of the shared data set that a test may damage."""
    return shutil.copytree(blobs.path, tmp_path / "data")
