"""What a grounding head is trained on: images, and the latents that the network was given at the captured step.

    images/003/003072.png    the image; a thousand samples share a folder (.jpg with --jpeg-quality)
    latents/000012.npy       float32 [N,4,h,w] of a shard, in the order of its record's rows

Masks are none of this format: a detector makes them of the images (gd-train examples).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grounded_diffusion.engine.dataset.formats.common import Encoded, Format, Settings, describe, encode_image
from grounded_diffusion.engine.dataset.record import Record, subfolder
from grounded_diffusion.engine.dataset.rows import ExamplesRow
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.errors import UsageError

LATENTS = "latents"


class ExamplesFormat(Format):
    """See common.Format."""

    name = "examples"
    row = ExamplesRow

    def __init__(self, settings: Settings):
        self.settings = settings

    def encode(self, record: Record) -> Encoded:
        if record.captured_latents is None:
            raise UsageError("examples need the latents of the captured step, which only gd-infer has at hand")
        image = f"images/{subfolder(record.index)}/{record.id}.{self.settings.suffix}"
        things = [{"name": thing.name, "label": thing.label} for thing in record.objects]
        row = {**describe(record), "image": image, "objects": things}
        files = {image: encode_image(record.image, self.settings.jpeg_quality)}
        return Encoded({**files, LATENTS: npy(record.captured_latents.astype(np.float32))}, row)

    def pack(self, shard: int, of: int, samples: Sequence[Encoded]) -> Iterable[tuple[str, bytes]]:
        latents = []
        for sample in samples:
            for path, content in sample.files.items():
                if path == LATENTS:
                    latents.append(np.load(io.BytesIO(content)))
                else:
                    yield path, content
        yield f"{LATENTS}/{shard:06d}.npy", npy(np.stack(latents) if latents else np.zeros((0, 4, 1, 1), np.float32))

    def finish(self, storage: Storage, rows: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Nothing: the shards' records say it all."""


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file, the same bytes for the same array."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
