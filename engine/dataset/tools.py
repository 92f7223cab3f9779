"""What can be done with folder data sets besides conversion: statistics, train/val lists, merging."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import Encoded, Settings
from grounded_diffusion.engine.dataset.formats.folder import FolderFormat, file_paths, record_files
from grounded_diffusion.engine.dataset.ours import folder_files
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import SPLITS, sample_id
from grounded_diffusion.engine.dataset.runfile import MERGE
from grounded_diffusion.engine.dataset.shards import Recording, digest_of, note_files, write_dataset
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.verify import verify
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import fresh_folder

MERGED_SHARD = 1000  # samples in a shard of a merged data set
BINS = 10  # of the histograms


@dataclass(slots=True)
class Tally:
    """Numbers between 0 and 1, as they come: how many, their sum, extremes and histogram of BINS equal bins."""

    count: int = 0
    total: float = 0.0
    least: float = 1.0
    most: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.bins[min(int(value * BINS), BINS - 1)] += 1

    @property
    def mean(self) -> float:
        """0 of nothing."""
        return self.total / self.count if self.count else 0.0


def statistics(data: FolderDataset) -> dict[str, Any]:
    """Counts and areas per class and overlaps per pair of classes, as JSON takes them.

    `classes`: by name, how many images ask for it (`images`), how many of these masks are empty (`empty`), the others'
    smallest, mean and largest share of the image and how many have each tenth (`areas`), their mean score and how many
    have each tenth (`scores`). `overlaps`: by pair, images where both masks share pixels, of how many that ask for
    both, and the mean intersection over union where they do.
    """
    asked: dict[str, int] = dict.fromkeys(data.names, 0)
    shares, scores = ({name: Tally() for name in data.names} for _ in range(2))
    pairs: dict[tuple[str, str], tuple[Tally, Tally]] = {}  # of all images, and of those that overlap
    for record in data:
        for thing in record.objects:
            asked[thing.name] += 1
            if thing.area:
                shares[thing.name].add(thing.area / (record.width * record.height))
                scores[thing.name].add(thing.score)
        masks = {thing.name: thing.mask for thing in record.objects} if len(record.objects) > 1 else {}
        for pair in combinations(sorted(masks), 2):
            shared, either = (
                int(join(masks[pair[0]], masks[pair[1]]).sum()) for join in (np.logical_and, np.logical_or)
            )
            every, overlapping = pairs.setdefault(pair, (Tally(), Tally()))
            every.add(shared / max(either, 1))
            if shared:
                overlapping.add(shared / either)
    return {
        "images": len(data),
        "objects": sum(asked.values()),
        "classes": {name: class_statistics(asked[name], shares[name], scores[name]) for name in data.names},
        "overlaps": [
            {"classes": list(pair), "images": every.count, "overlapping": some.count, "mean_iou": some.mean}
            for pair, (every, some) in sorted(pairs.items())
        ],
    }


def class_statistics(asked: int, shares: Tally, scores: Tally) -> dict[str, Any]:
    """A class's entry."""
    return {
        "images": asked,
        "empty": asked - shares.count,
        "min_area": shares.least if shares.count else 0.0,
        "mean_area": shares.mean,
        "max_area": shares.most,
        "mean_score": scores.mean,
        "areas": shares.bins,
        "scores": scores.bins,
    }


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


def merge(sources: list[str], out: Path, overwrite: bool = False) -> int:
    """Join folder data sets into a new one, numbering the samples anew; returns how many there are.

    Raises:
        UsageError: a source has a problem, an image occurs twice, or `out` cannot be written.
    """
    sets = [FolderDataset(source) for source in sources]
    for data in sets:
        for problem in islice(verify(data.storage.root), 1):
            root = data.storage.root
            raise UsageError(f"{problem}; gd-dataset verify {root} lists all problems; repair them before merging")
    check_different(sets)
    count, run = sum(map(len, sets)), {"merged": [data.settings for data in sets]}
    everything = ((data.storage, row) for data in sets for row in data.rows())
    items = ((storage, row, index) for index, (storage, row) in enumerate(everything))
    with fresh_folder(out, overwrite, functools.partial(folder_files, command=MERGE)) as folder:
        format = FolderFormat(Settings())
        write_dataset(LocalStorage(folder), format, [(count, items)], lambda item: copy(*item), MERGED_SHARD, run)
    return count


def copy(source: Storage, row: dict[str, Any], index: int) -> Encoded:
    """A sample with the files that it has, under the names of sample `index`."""
    old = record_files(row)
    new = file_paths(index, [thing["name"] for thing in row["objects"]], row["image"].rpartition(".")[2])
    files = {path: source.read(file) for path, file in zip(new, old, strict=True)}
    objects = [{**thing, "mask": path} for thing, path in zip(row["objects"], new[2:], strict=True)]
    return Encoded(files, {**row, "id": sample_id(index), "index": index, "image": new[0], "mask": new[1],
                           "objects": objects})  # fmt: skip


def check_different(sets: list[FolderDataset]) -> None:
    """Raise UsageError where an image occurs twice. Of each image, sixteen bytes are kept."""
    digests = bytearray()
    for _, digest in image_digests(sets):
        digests += digest
    values, counts = np.unique(np.frombuffer(digests, "V16"), return_counts=True)
    twice = {value.tobytes() for value in values[counts > 1]}
    places: dict[bytes, str] = {}
    for image, digest in image_digests(sets) if twice else ():
        if digest in places:
            raise UsageError(f"{image} is the same picture as {places[digest]}; a merged data set has each once")
        if digest in twice:
            places[digest] = image


def image_digests(sets: list[FolderDataset]) -> Iterator[tuple[str, bytes]]:
    """(file, 16 bytes of its SHA-256) of every image."""
    for data in sets:
        for row in data.rows():
            digest = digest_of(data.storage, row["image"])
            yield f"{data.storage.root}/{row['image']}", bytes.fromhex(digest)[:16]
