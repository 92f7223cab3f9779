"""WebDataset: tar files `train-000000.tar` upward, the members of a sample side by side.

    <id>.jpg (or .png), <id>.seg.png with class ids, <id>.json, <id>.txt with the prompt

Times, owners and order are fixed, so the same records give the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from grounded_diffusion.engine.dataset import Record
from grounded_diffusion.engine.formats.common import (
    Settings,
    class_map,
    describe,
    describe_objects,
    encode_image,
    encode_labels,
)
from grounded_diffusion.engine.writer import readable_errors


class WebDatasetWriter:
    """See common.Writer."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder, self.settings = folder, settings
        self.open: dict[str, tarfile.TarFile] = {}
        self.written: dict[str, int] = {}

    def put(self, record: Record) -> None:
        content = {**describe(record), "objects": describe_objects(record, self.settings.classes)}
        members = {
            self.settings.suffix: encode_image(record.image, self.settings.jpeg_quality),
            "seg.png": encode_labels(class_map(record, self.settings)),
            "json": json.dumps(content, ensure_ascii=False).encode(),
            "txt": record.prompt.encode(),
        }
        with readable_errors(self.folder):
            tar = self._tar(record.split)
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{record.id}.{suffix}")
                member.size, member.mode, member.mtime = len(data), 0o644, 0
                tar.addfile(member, io.BytesIO(data))

    def _tar(self, split: str) -> tarfile.TarFile:
        """The open tar file of a split; a new one when the last is full."""
        written = self.written.get(split, 0)
        if written % self.settings.shard_size == 0:
            if written:
                self.open[split].close()
            path = self.folder / f"{split}-{written // self.settings.shard_size:06d}.tar"
            self.open[split] = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.written[split] = written + 1
        return self.open[split]

    def close(self) -> None:
        with readable_errors(self.folder):
            for tar in self.open.values():
                tar.close()
