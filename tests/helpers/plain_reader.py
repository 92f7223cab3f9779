"""Lines of metadata.jsonl read with Python's own json, and how long that takes beside the typed reader.

`python tests/helpers/plain_reader.py 1000000` prints seconds for that many lines, in turns, and their ratio.
"""

import json
import sys
import time

from grounded_diffusion.engine.dataset.record import sample_id
from grounded_diffusion.engine.dataset.rows import read_line

FIELDS = {"id": str, "index": int, "prompt": str, "seed": int, "draw": int, "width": int, "height": int,
          "capture_timestep": (int, float), "image": str, "mask": str, "objects": list}  # fmt: skip
OBJECT_FIELDS = {"name": str, "label": int, "area": int, "box": list, "score": (int, float), "mask": str}


def plain_line(line):
    """What the typed reader checks but for fields given twice and ranges, with json and isinstance."""
    row = json.loads(line)
    check_fields(row, FIELDS)
    if row["index"] < 0 or row["id"] != sample_id(row["index"]):
        raise ValueError("id")
    for thing in row["objects"]:
        check_fields(thing, OBJECT_FIELDS)
        if len(thing["box"]) != 4 or not all(isinstance(side, int) for side in thing["box"]):
            raise ValueError("box")
    for file in (row["image"], row["mask"], *(thing["mask"] for thing in row["objects"])):
        if file.startswith("/") or ".." in file.split("/"):
            raise ValueError(file)
    if sorted(thing["label"] for thing in row["objects"]) != list(range(1, len(row["objects"]) + 1)):
        raise ValueError("labels")
    if len({thing["name"] for thing in row["objects"]}) < len(row["objects"]):
        raise ValueError("names")
    return row


def check_fields(value, fields):
    if not isinstance(value, dict):
        raise ValueError("no object")
    for name, kind in fields.items():
        if isinstance(value.get(name), bool) or not isinstance(value.get(name), kind):
            raise ValueError(name)


def metadata_row(index):
    """A sample with two objects, as gd-infer writes it."""
    stem = f"{index // 1000:03d}/{index:06d}"
    things = [
        {"name": name, "label": k, "area": 1234 + k, "box": [1, 2, 300, 400], "score": 0.7512,
         "mask": f"objects/{stem}_{k - 1}_{name}.png"}
        for k, name in enumerate(("dog", "cat"), 1)
    ]  # fmt: skip
    return {
        "id": f"{index:06d}", "index": index, "prompt": "a photograph of a dog and a cat", "seed": 0, "draw": index,
        "width": 512, "height": 512, "capture_timestep": 1.0, "image": f"images/{stem}.png",
        "mask": f"masks/{stem}.png", "objects": things,
    }  # fmt: skip


def in_turns(count, piece=20_000):
    """Seconds for `count` lines: with json, and with the typed reader, piece by piece in turns."""
    seconds = {plain_line: 0.0, read_line: 0.0}
    for first in range(0, count, piece):
        rows = map(metadata_row, range(first, min(first + piece, count)))
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        for read in seconds:
            started = time.perf_counter()
            for line in lines:
                read(line)
            seconds[read] += time.perf_counter() - started
    return tuple(seconds.values())


if __name__ == "__main__":
    plain, typed = in_turns(int(sys.argv[1]))
    print(f"{sys.argv[1]} lines: json {plain:.1f} s, typed {typed:.1f} s; json takes {plain / typed:.2f} times as long")
