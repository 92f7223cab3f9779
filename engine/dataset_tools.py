"""What can be done with folder data sets besides conversion: statistics, train/val lists, merging."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset import SPLITS, FolderDataset
from grounded_diffusion.engine.dataset_verify import verify
from grounded_diffusion.engine.formats.common import fresh_folder
from grounded_diffusion.engine.gallery import render_gallery
from grounded_diffusion.engine.writer import FOLDERS, FORMAT, INDEX, METADATA, RUN, replace_file, slug
from grounded_diffusion.errors import UsageError


def statistics(data: FolderDataset) -> dict[str, Any]:
    """Counts and areas per class and overlaps per pair of classes, as JSON takes them.

    `classes`: by name, how many images ask for it (`images`), how many of these masks are empty (`empty`), the others'
    smallest, mean and largest share of the image, and their mean score. `overlaps`: by pair, images where both masks
    share pixels, of how many that ask for both, and the mean intersection over union where they do.
    """
    shares: dict[str, list[float]] = {name: [] for name in data.names}
    scores: dict[str, list[float]] = {name: [] for name in data.names}
    pairs: dict[tuple[str, str], list[float]] = {}
    for record in data:
        for thing in record.objects:
            shares[thing.name].append(thing.area / (record.width * record.height))
            scores[thing.name].append(thing.score)
        masks = {thing.name: thing.mask for thing in record.objects} if len(record.objects) > 1 else {}
        for first, second in combinations(sorted(masks), 2):
            shared, either = masks[first] & masks[second], masks[first] | masks[second]
            pairs.setdefault((first, second), []).append(float(shared.sum() / max(either.sum(), 1)))
    return {
        "images": len(data),
        "objects": sum(map(len, shares.values())),
        "classes": {name: class_statistics(shares[name], scores[name]) for name in data.names},
        "overlaps": [
            {
                "classes": list(pair),
                "images": len(values),
                "overlapping": sum(value > 0 for value in values),
                "mean_iou": mean([value for value in values if value > 0]),
            }
            for pair, values in sorted(pairs.items())
        ],
    }


def class_statistics(shares: list[float], scores: list[float]) -> dict[str, Any]:
    """A class's entry."""
    seen = [share for share in shares if share > 0]
    return {
        "images": len(shares),
        "empty": len(shares) - len(seen),
        "min_area": min(seen, default=0.0),
        "mean_area": mean(seen),
        "max_area": max(seen, default=0.0),
        "mean_score": mean([score for share, score in zip(shares, scores, strict=True) if share > 0]),
    }


def mean(values: list[float]) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if values else 0.0


def in_val(id: str, share: float) -> bool:
    """Whether a sample belongs to val: its id's hash decides, so a data set that grows keeps its split."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") < share * 2**64


def split(data: FolderDataset, share: float) -> dict[str, int]:
    """Write train.txt and val.txt into the data set; returns their lengths. Raises UsageError for an empty one."""
    if not 0 < share < 1:
        raise UsageError(f"--val must lie between 0 and 1, not {share:g}")
    lists: dict[str, list[str]] = {name: [] for name in SPLITS}
    for row in data.rows:
        lists[SPLITS[in_val(row["id"], share)]].append(row["id"])
    for name, ids in lists.items():
        if not ids:
            raise UsageError(f"{name} would be empty with --val {share:g} of {len(data)} images; choose another share")
    for name, ids in lists.items():
        replace_file(data.path / f"{name}.txt", "".join(f"{id}\n" for id in ids).encode())
    return {name: len(ids) for name, ids in lists.items()}


def merge(sources: list[Path], out: Path, overwrite: bool = False) -> int:
    """Join folder data sets into a new one, numbering the samples anew; returns how many there are.

    Raises:
        UsageError: a source has a problem, an image occurs twice, or `out` cannot be written.
    """
    sets = [FolderDataset(source) for source in sources]
    for data in sets:
        for problem in islice(verify(data.path), 1):
            raise UsageError(f"{problem}; gd-dataset verify {data.path} lists all problems; repair them before merging")
    settings = {"merged": [data.settings for data in sets]}
    rows, seen = [], {}
    with fresh_folder(out, overwrite, is_ours=RUN) as folder:
        for name in FOLDERS:
            (folder / name).mkdir()
        for data in sets:
            for row in data.rows:
                image = data.path / row["image"]
                digest = hashlib.sha256(image.read_bytes()).digest()
                if digest in seen:
                    raise UsageError(f"{image} is the same picture as {seen[digest]}; a merged data set has each once")
                seen[digest] = image
                rows.append(copy_row(data.path, row, folder, len(rows)))
        page = render_gallery(folder, rows, {}, settings)
        replace_file(folder / INDEX, page.encode())
        replace_file(folder / RUN, json.dumps({"format": FORMAT, "settings": settings}, indent=1).encode())
        replace_file(folder / METADATA, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return len(rows)


def copy_row(source: Path, row: dict[str, Any], folder: Path, index: int) -> dict[str, Any]:
    """Copy a record's files under the names of sample `index`; returns its new record."""
    id = f"{index:06d}"
    new = {**row, "id": id, "index": index, "image": f"images/{id}.png", "mask": f"masks/{id}.png"}
    new["objects"] = [
        {**thing, "mask": f"objects/{id}_{k}_{slug(thing['name'])}.png"} for k, thing in enumerate(row["objects"])
    ]
    shutil.copyfile(source / row["image"], folder / new["image"])
    shutil.copyfile(source / row["mask"], folder / new["mask"])
    for old, thing in zip(row["objects"], new["objects"], strict=True):
        shutil.copyfile(source / old["mask"], folder / thing["mask"])
    return new
