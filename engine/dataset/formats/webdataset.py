"""WebDataset: a tar file a shard, `train-000000.tar` upward, of val `val-000000.tar`, a sample's members side by side.

    <id>.jpg (or .png), <id>.seg.png with class ids, <id>.json, <id>.txt with the prompt

Times, owners and order are fixed, so the same records give the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
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
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.storage.base import Storage


class WebDatasetFormat(Format):
    """See common.Format."""

    name = "webdataset"

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        row = {**describe(record), "objects": describe_objects(record, self.settings.classes)}
        files = {
            f"{record.id}.{self.settings.suffix}": encode_image(record.image, self.settings.jpeg_quality),
            f"{record.id}.seg.png": encode_labels(class_map(record, self.settings)),
            f"{record.id}.json": json.dumps(row, ensure_ascii=False).encode(),
            f"{record.id}.txt": record.prompt.encode(),
        }
        return Encoded(files, {**row, "split": record.split})

    def pack(self, shard: int, of: int, samples: Sequence[Encoded]) -> Iterable[tuple[str, bytes]]:
        for split, part in by_split(samples):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in part:
                    for name, content in sample.files.items():
                        member = tarfile.TarInfo(name)
                        member.size, member.mode, member.mtime = len(content), 0o644, 0
                        tar.addfile(member, io.BytesIO(content))
            yield f"{split}-{shard:06d}.tar", stream.getvalue()

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Nothing: the tar files say it all."""
