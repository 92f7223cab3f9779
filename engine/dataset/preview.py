"""A data set to look at: one small HTML page whose data load as the reader scrolls, so that its size does not matter.

    index.html               the page: preview.html as it stands
    preview/index.js         counts, settings, the classes
    preview/000012.js        CHUNK samples
    preview/block-000.js     where each class occurs among BLOCK samples

The files are scripts because a page opened from a disk (file://) may load nothing else. Masks are drawn by the browser
from the label maps, so that making the page reads no image.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.dataset.storage.base import Storage

PAGE, FOLDER = "index.html", "preview"
TEMPLATE = Path(__file__).with_name("preview.html")
CHUNK = 500  # samples a file: some 150 kB, which a browser reads in a few milliseconds
BLOCK = 100_000  # samples that the page shows at a time; browsers cannot lay out much more than 10 million pixels
SHOWN_SETTINGS = ("sampler", "steps", "guidance_scale", "seed")


def write_preview(storage: Storage, rows: Iterable[dict[str, Any]], settings: dict[str, Any]) -> int:
    """Write the page and its data; returns the number of samples. Holds no more than a block's positions in memory.

    Args:
        storage: where the data set is; the rows' files are relative to it.
        rows: the samples, in order: id, prompt, image, seed, width, height, objects, and mask where there is a label
            map. An object has name, label, area, score, and mask where it has a file of its own.
        settings: of the run; shown at the top.
    """
    rows, written = iter(rows), {f"{FOLDER}/index.js"}
    samples, classes, size = 0, Counter(), (1, 0)  # width and height of the tallest
    places: dict[str, Places] = defaultdict(Places)  # of the block
    for number, chunk in enumerate(iter(lambda: list(islice(rows, CHUNK)), [])):
        written.add(put(storage, f"{number:06d}", "chunk", number, [compact(row) for row in chunk]))
        for row in chunk:
            size = max(size, (row["width"], row["height"]), key=lambda s: s[1] / s[0])
            for name in dict.fromkeys(thing["name"] for thing in row["objects"]):
                classes[name] += 1
                places[name].add(samples % BLOCK)
            samples += 1
        if samples % BLOCK == 0:
            written.add(put_places(storage, samples // BLOCK - 1, places))
            places.clear()
    if samples % BLOCK:
        written.add(put_places(storage, samples // BLOCK, places))
    told = " · ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in SHOWN_SETTINGS if key in settings)
    index = {"samples": samples, "chunk": CHUNK, "block": BLOCK, "size": size, "settings": told,
             "classes": sorted(classes.items())}  # fmt: skip
    put(storage, "index", "index", index)
    for name in storage.list(FOLDER):
        if f"{FOLDER}/{name}" not in written:  # of an earlier, longer preview
            storage.remove(f"{FOLDER}/{name}")
    storage.put(PAGE, TEMPLATE.read_bytes())
    return samples


def compact(row: dict[str, Any]) -> list[Any]:
    """A sample as the page's `Sample` reads it."""
    pixels = row["width"] * row["height"]
    objects = [
        [thing["name"], thing["label"], round(thing["area"] / pixels, 4), thing["score"], thing.get("mask")]
        for thing in row["objects"]
    ]
    files = row["image"], row.get("mask")
    seed = str(row["seed"])  # may have more digits than a number of JavaScript holds
    return [row["id"], row["prompt"], *files, seed, row["width"], row["height"], objects]


class Places:
    """Increasing positions, each as the step from the one before: 4 bytes in memory, and mostly 3 in the file."""

    def __init__(self):
        self.steps, self.last = array("I"), 0

    def add(self, position: int) -> None:
        self.steps.append(position - self.last)
        self.last = position


def put_places(storage: Storage, block: int, places: dict[str, Places]) -> str:
    """Write where a block's classes are."""
    steps = {name: found.steps.tolist() for name, found in places.items()}
    return put(storage, f"block-{block:03d}", "places", block, steps)


def put(storage: Storage, name: str, function: str, *values: Any) -> str:
    """Write a script that hands values to the page; returns its path."""
    told = ",".join(json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values)
    storage.put(f"{FOLDER}/{name}.js", f"gd.{function}({told});\n".encode())
    return f"{FOLDER}/{name}.js"
