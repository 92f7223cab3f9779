"""Hugging Face Parquet: `data/train-00000-of-00002.parquet`, images and masks as `struct<bytes, path>`.

The columns are those of imagefolder.py. The schema carries the Hugging Face features, so that images decode by
themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grounded_diffusion.engine.dataset.formats.common import (
    Encoded,
    Format,
    Settings,
    by_split,
    class_map,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
)
from grounded_diffusion.engine.dataset.formats.imagefolder import HF_SPLITS, OBJECTS, SCALARS, card
from grounded_diffusion.engine.dataset.formats.tables import count_splits
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError

ROW_GROUP = 100  # rows that a reader has to load at once; Hugging Face's own choice for images


class ParquetFormat(Format):
    """See common.Format."""

    name = "hf-parquet"

    def __init__(self, settings: Settings):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(
                "Parquet needs pyarrow; install it with: pip install 'grounded-diffusion[parquet]'"
            ) from None
        self.arrow, self.settings, self.schema = pyarrow, settings, schema(pyarrow)

    def encode(self, record: Record) -> Encoded:
        files = {
            f"{record.id}.{self.settings.suffix}": encode_image(record.image, self.settings.jpeg_quality),
            f"{record.id}_mask.png": encode_labels(class_map(record, self.settings)),
        }
        objects = describe_objects(record, self.settings.classes)
        return Encoded(files, {**describe(record), "split": record.split, "objects": objects})

    def pack(self, shard: int, of: int, samples: Sequence[Encoded]) -> Iterable[tuple[str, bytes]]:
        for split, part in by_split(samples):
            stream = self.arrow.BufferOutputStream()
            with self.arrow.parquet.ParquetWriter(stream, self.schema) as writer:
                for start in range(0, len(part), ROW_GROUP):
                    rows = [self._columns(sample) for sample in part[start : start + ROW_GROUP]]
                    writer.write_table(self.arrow.Table.from_pylist(rows, self.schema))
            yield f"data/{HF_SPLITS[split]}-{shard:05d}-of-{of:05d}.parquet", stream.getvalue().to_pybytes()

    def _columns(self, sample: Encoded) -> dict[str, Any]:
        image, mask = ({"bytes": content, "path": name} for name, content in sample.files.items())
        return {"image": image, "mask": mask, **{name: sample.row[name] for name in (*SCALARS, "objects")}}

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        counts = {HF_SPLITS[split]: count for split, count in count_splits(rows).items()}
        paths = {split: f"data/{split}-*" for split in counts}
        storage.put("README.md", card(paths, counts, self.settings).encode())


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
