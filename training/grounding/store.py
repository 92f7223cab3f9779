"""Examples on disk: what the head is trained on, shard by shard.

    examples.json            what they are: base model, names, detector of the masks
    shards/000012.json       record of a shard, as of every data set: one row an example
    latents/000012.npy       float32 [N,4,h,w], what the UNet was given at the captured call
    images/003/003072.png    the images, for the detector and for the eye
    masks/000012.npy         uint8 [M,H,W/8], the masks of the shard's objects in order, eight pixels a byte
    masks/000012.json        record of the masks: detector, scores, SHA-256

Features are not kept: one UNet call on the latent gives them back, and they are a thousand times larger.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from PIL import Image

from grounded_diffusion.engine.dataset.shards import DamagedShard, finished_shards, read_shard
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import Misfit, Number, as_type, decode, load_json

ABOUT = "examples.json"
MASKS = "masks"


@dataclass(frozen=True, slots=True)
class About:
    """What a folder of examples says of itself.

    Attributes:
        base: digest of the base model, see generator.base.
        capture_timestep: at which the head is to read.
        query_template: text whose sub-tokens at "{}" make a query.
        seen, unseen: names.
        source: where images and latents come from, JSON-ready.
    """

    base: str
    capture_timestep: int
    query_template: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    source: dict[str, Any]

    def encode(self) -> bytes:
        content = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"


def read_about(storage: Storage) -> About:
    """Raises UsageError where there are no examples."""
    try:
        return decode(storage.read(ABOUT), About)
    except FileNotFoundError:
        raise UsageError(f"{storage.root} has no finished examples; make them with gd-train examples") from None
    except Misfit as error:
        again = "is damaged; remove it and run gd-train examples again"
        raise UsageError(f"{storage.root}/{ABOUT} {again} ({error})") from None


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def latents_path(shard: int) -> str:
    return f"latents/{shard:06d}.npy"


def masks_path(shard: int, suffix: str = "npy") -> str:
    return f"{MASKS}/{shard:06d}.{suffix}"


def encode_masks(shard: int, masks: Sequence[np.ndarray], scores: Sequence[np.ndarray], about: dict) -> tuple:
    """(file, record) of a shard's masks: bool [O,H,W] and float [O] an example."""
    joined = np.concatenate(masks) if masks else np.zeros((0, 1, 8), np.bool_)
    content = npy(np.packbits(joined, axis=-1))
    record = {
        "shard": shard,
        "detector": about,
        "sha256": hashlib.sha256(content).hexdigest(),
        "width": joined.shape[-1],
        "areas": [mask.sum((1, 2)).tolist() for mask in masks],
        "scores": [[round(float(score), 4) for score in row] for row in scores],
    }
    return content, json.dumps(record, ensure_ascii=False).encode() + b"\n"


class MasksRecord(Struct):
    """The record of a shard's masks."""

    shard: Number
    detector: dict[str, Any]
    sha256: str
    width: Number
    areas: list[list[Number]]
    scores: list[list[float]]


def read_masks_record(storage: Storage, shard: int) -> dict[str, Any] | None:
    """The record of a shard's masks; None where there is none that can be used."""
    try:
        record = load_json(storage.read(masks_path(shard, "json")))
        found = as_type(record, MasksRecord)
    except (FileNotFoundError, Misfit):
        return None
    return record if found.shard == shard else None


def damaged_file(storage: Storage, files: dict[str, str]) -> str | None:
    """The first file that is missing or not what its record says."""
    for path, digest in files.items():
        try:
            if hashlib.sha256(storage.read(path)).hexdigest() != digest:
                return path
        except FileNotFoundError:
            return path
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One image as the head is trained on it.

    Attributes:
        latents: float32 [4,h,w], as the UNet was given them.
        timestep: of that call.
        masks: bool [O,H,W].
    """

    prompt: str
    names: tuple[str, ...]
    latents: np.ndarray
    timestep: float
    masks: np.ndarray


class ExampleSet:
    """All examples of a folder. Arrays are mapped, not read, so that any number of them takes little memory.

    Args:
        folder: what gd-train examples or gd-train real wrote.
        verify: compare the SHA-256 of all latents and masks.

    Raises:
        UsageError: no examples there, shards without masks, or damaged files; says which.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, storage = Path(folder), open_storage(str(folder))
        self.about = read_about(storage)
        self.detectors: list[dict[str, Any]] = []
        self._rows: list[tuple[int, int, int, dict[str, Any]]] = []  # (shard, row in it, first mask in it, row)
        self._widths: dict[int, int] = {}
        self._areas: list[list[int]] = []
        self._open: dict[str, np.ndarray] = {}
        for shard in finished_shards(storage):
            self._add(storage, shard, verify)
        if not self._rows:
            raise UsageError(f"{folder} has no examples that can be used; make them with gd-train examples")

    def _add(self, storage: Storage, shard: int, verify: bool) -> None:
        again = "run gd-train examples again, which makes it anew"
        try:
            record = read_shard(storage, shard)
        except DamagedShard as error:
            raise UsageError(f"{str(error).partition(';')[0]}; {again}") from None
        masks = read_masks_record(storage, shard)
        if masks is None:
            raise UsageError(f"shard {shard} of {self.folder} has no masks; {again}")
        files = {path: digest for path, digest in record["files"].items() if path == latents_path(shard)}
        if verify and (bad := damaged_file(storage, {**files, masks_path(shard): masks["sha256"]})):
            raise UsageError(f"{self.folder}/{bad} is damaged; {again}")
        if masks["detector"] not in self.detectors:
            self.detectors.append(masks["detector"])
        first = 0
        for number, row in enumerate(record["rows"]):
            self._rows.append((shard, number, first, row))
            self._areas.append(masks["areas"][number])
            first += len(row["objects"])
        self._widths[shard] = masks["width"]

    def __len__(self) -> int:
        return len(self._rows)

    def names(self, k: int) -> tuple[str, ...]:
        """Names of an example's objects."""
        return tuple(thing["name"] for thing in self._rows[k][3]["objects"])

    def areas(self, k: int) -> list[int]:
        """Pixels of an example's masks; 0 where the detector found nothing."""
        return self._areas[k]

    def row(self, k: int) -> dict[str, Any]:
        """An example's row in its shard's record."""
        return self._rows[k][3]

    def key(self, k: int) -> tuple[int, int]:
        """(seed, draw) of the noise that an example's image was made of."""
        row = self._rows[k][3]
        return row["seed"], row["draw"]

    def image(self, k: int) -> np.ndarray:
        """An example's image, uint8 [H,W,3]."""
        return read_image(open_storage(str(self.folder)), self._rows[k][3])

    def __getitem__(self, k: int) -> Example:
        shard, number, first, row = self._rows[k]
        names = self.names(k)
        packed = self._map(masks_path(shard))[first : first + len(names)]
        return Example(
            prompt=row["prompt"],
            names=names,
            latents=np.array(self._map(latents_path(shard))[number]),
            timestep=float(row["capture_timestep"]),
            masks=np.unpackbits(packed, axis=-1, count=self._widths[shard]).astype(np.bool_),
        )

    def _map(self, path: str) -> np.ndarray:
        if path not in self._open:
            self._open[path] = np.load(self.folder / path, mmap_mode="r", allow_pickle=False)
        return self._open[path]


def read_image(storage: Storage, row: dict[str, Any]) -> np.ndarray:
    """The image of a row, uint8 [H,W,3]."""
    return np.asarray(Image.open(io.BytesIO(storage.read(row["image"]))).convert("RGB"))


def yields(storage: Storage, shards: Iterable[int]) -> dict[str, dict[str, int]]:
    """What came of each name: {"images", "found", "zero"}."""
    counts: dict[str, dict[str, int]] = {}
    for shard in shards:
        record, masks = read_shard(storage, shard), read_masks_record(storage, shard)
        for row, areas in zip(record["rows"], masks["areas"], strict=True):
            for thing, area in zip(row["objects"], areas, strict=True):
                count = counts.setdefault(thing["name"], {"images": 0, "found": 0, "zero": 0})
                count["images"] += 1
                count["found" if area else "zero"] += 1
    return dict(sorted(counts.items()))
