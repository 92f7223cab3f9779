"""Hugging Face Parquet: `data/train-00000-of-00002.parquet`, images and masks as `struct<bytes, path>`.

The columns are those of imagefolder.py. The schema carries the Hugging Face features, so that images decode by
themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.formats.common import (
    Settings,
    class_map,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
    put_file,
)
from grounded_diffusion.engine.formats.imagefolder import HF_SPLITS, OBJECTS, SCALARS, card
from grounded_diffusion.engine.writer import readable_errors
from grounded_diffusion.errors import UsageError

ROW_GROUP = 100  # rows that a reader has to load at once; Hugging Face's own choice for images


class ParquetWriter:
    """See common.Writer. At most `ROW_GROUP` encoded samples a split are held in memory."""

    def __init__(self, folder: Path, settings: Settings):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(
                "Parquet needs pyarrow; install it with: pip install 'grounded-diffusion[parquet]'"
            ) from None
        self.arrow, self.folder, self.settings = pyarrow, folder, settings
        self.schema = schema(pyarrow)
        self.open: dict[str, Any] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.counts: dict[str, int] = {}

    def put(self, record: Record) -> None:
        split, suffix = HF_SPLITS[record.split], self.settings.suffix
        row = {
            "image": {
                "bytes": encode_image(record.image, self.settings.jpeg_quality),
                "path": f"{record.id}.{suffix}",
            },
            "mask": {"bytes": encode_labels(class_map(record, self.settings)), "path": f"{record.id}_mask.png"},
            **describe(record),
            "objects": describe_objects(record, self.settings.classes),
        }
        rows = self.rows.setdefault(split, [])
        rows.append(row)
        self.counts[split] = self.counts.get(split, 0) + 1
        full = self.counts[split] % self.settings.shard_size == 0
        if full or len(rows) == ROW_GROUP:
            self._flush(split, full)

    def _flush(self, split: str, finish: bool) -> None:
        """Write the rows in hand; `finish` ends the file."""
        with readable_errors(self.folder):
            if self.rows[split]:
                if split not in self.open:
                    shard = (self.counts[split] - 1) // self.settings.shard_size
                    (self.folder / "data").mkdir(exist_ok=True)
                    self.open[split] = self.arrow.parquet.ParquetWriter(
                        self.folder / "data" / f"{split}-{shard:05d}", self.schema
                    )
                self.open[split].write_table(self.arrow.Table.from_pylist(self.rows[split], self.schema))
                self.rows[split].clear()
            if finish and split in self.open:
                self.open.pop(split).close()

    def close(self) -> None:
        for split, count in self.counts.items():
            self._flush(split, True)
            shards = -(-count // self.settings.shard_size)
            for shard in range(shards):  # the total stands in the name, and is known only now
                file = self.folder / "data" / f"{split}-{shard:05d}"
                with readable_errors(file):
                    file.rename(file.with_name(f"{file.name}-of-{shards:05d}.parquet"))
        paths = {split: f"data/{split}-*" for split in self.counts}
        put_file(self.folder / "README.md", card(paths, self.counts, self.settings))


def schema(arrow: Any) -> Any:
    """The Arrow schema, with the Hugging Face features as metadata."""
    types = {"string": arrow.string(), "int64": arrow.int64(), "float64": arrow.float64()}
    value = lambda kind: {"dtype": kind, "_type": "Value"}
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    box = arrow.list_(arrow.int64())
    things = arrow.struct([*((name, types[kind]) for name, kind in OBJECTS.items()), ("box", box)])
    fields = [("image", image), ("mask", image), *((name, types[kind]) for name, kind in SCALARS.items())]
    features = {
        "image": {"_type": "Image"},
        "mask": {"_type": "Image"},
        **{name: value(kind) for name, kind in SCALARS.items()},
        "objects": [{**{name: value(kind) for name, kind in OBJECTS.items()}, "box": [value("int64")]}],
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return arrow.schema([*fields, ("objects", arrow.list_(things))], metadata)
