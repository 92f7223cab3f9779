"""Real images as examples (the paper's C.3): classes from the annotations, the latent by DDIM inversion.

The head reads the first step of the inversion, which is one UNet call on the clean latent, so the clean latent is all
that is kept. Images with an unseen name are left out, so that a head never sees one; so are names of fewer pixels than
LEAST_AREA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grounded_diffusion.engine.dataset.formats.common import encode_image, encode_labels
from grounded_diffusion.engine.dataset.instances import mask_box
from grounded_diffusion.engine.dataset.record import sample_id, subfolder
from grounded_diffusion.engine.dataset.shards import DamagedShard, encode_shard, read_shard
from grounded_diffusion.engine.dataset.storage.base import PARTIAL, SHARDS, Storage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.labels import meaning
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.annotations import Annotations
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.grounding.store import (
    ABOUT,
    MASKS,
    About,
    damaged_file,
    encode_masks,
    latents_path,
    masks_path,
    npy,
    read_about,
    read_masks_record,
)

OURS = {PARTIAL, SHARDS, MASKS, "images", "labels", "latents"}  # what a folder has that is not finished
LEAST_AREA = 0.01  # share of the image
SHARD = 64
CALL = 8  # images to one call of the autoencoder


@dataclass(frozen=True, slots=True, eq=False)
class RealImage:
    """An image cut to the model's size, with its names and their masks.

    Attributes:
        image: uint8 [H,W,3].
        masks: bool [O,H,W].
    """

    image: np.ndarray
    names: tuple[str, ...]
    masks: np.ndarray

    @property
    def prompt(self) -> str:
        return "a photograph of " + " and ".join(f"a {name}" for name in self.names)


def cut(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The middle of an image, as large as fits, at (H, W)."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    w, h = width * scale, height * scale
    x, y = (image.width - w) / 2, (image.height - h) / 2
    return image.resize((width, height), resample, box=(x, y, x + w, y + h))


def prepare(
    image: Image.Image, masks: dict[int, np.ndarray], names: dict[int, str | None], size: tuple[int, int]
) -> RealImage | None:
    """An image at the model's size; None where an unseen name is in it, or no seen one.

    Args:
        names: label -> seen name; None for an unseen one. Labels that are not in it are background.
    """
    if any(label in names and names[label] is None for label in masks):
        return None
    found: dict[str, np.ndarray] = {}
    for label, mask in sorted(masks.items()):
        if name := names.get(label):
            small = np.asarray(cut(Image.fromarray(mask), size, Image.Resampling.NEAREST))
            found[name] = found[name] | small if name in found else small
    found = {name: mask for name, mask in found.items() if mask.mean() >= LEAST_AREA}
    if not found:
        return None
    pixels = np.asarray(cut(image, size, Image.Resampling.BICUBIC))
    return RealImage(pixels, tuple(found), np.stack(list(found.values())))


def label_names(annotations: Annotations, split: Split) -> dict[int, str | None]:
    """Label -> seen name, or None for an unseen one. Raises UsageError where no seen name is annotated."""
    by_meaning = {meaning(name): name for name in split.seen} | {meaning(name): None for name in split.unseen}
    names = {k: by_meaning[meaning(label)] for k, label in annotations.labels.items() if meaning(label) in by_meaning}
    if not any(names.values()):
        raise UsageError(
            f"{annotations.about['annotations']} annotates none of the {len(split.seen)} seen names; its classes are "
            f"{', '.join(list(annotations.labels.values())[:12])}"
        )
    return names


def make_real(
    annotations: Annotations,
    split: Split,
    base: FrozenBase,
    out: Path,
    *,
    size: tuple[int, int],
    capture_timestep: int,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the examples; the same call makes what is missing. Returns how many there are.

    Args:
        size: (H, W) of the images.
        capture_timestep: of the head.
        limit: images to look at, from the first; None for all.
    """
    storage, names = open_storage(str(out)), label_names(annotations, split)
    source = {**annotations.about, "height": size[0], "width": size[1]}
    about = About(base.digest, capture_timestep, base.template, split.seen, split.unseen, source)
    begin(storage, about)
    total, first = min(len(annotations), limit or len(annotations)), 0
    shards = -(-total // SHARD)
    for shard in range(shards):
        if (count := made(storage, shard)) is None:
            items = (annotations.read(k) for k in range(shard * SHARD, min(total, (shard + 1) * SHARD)))
            images = [real for image, masks in items if (real := prepare(image, masks, names, size))]
            write(storage, shard, first, images, base, capture_timestep, annotations.about)
            count = len(images)
            say(f"shard {shard + 1} of {shards}: {count} images with a seen name and no unseen one")
        first += count
    if not first:
        raise UsageError(f"none of the {total} images has a seen name without an unseen one beside it")
    storage.put(ABOUT, about.encode())
    return first


def begin(storage: Storage, about: About) -> None:
    """Raise UsageError where the output has other examples, or is not ours."""
    if storage.exists(ABOUT):
        before = read_about(storage)
        if changed := [name for name in About.__slots__ if getattr(before, name) != getattr(about, name)]:
            raise UsageError(f"{storage.root} has other examples ({', '.join(changed)} differ); choose another --out")
    elif Path(storage.root).is_dir() and {path.name for path in Path(storage.root).iterdir()} - OURS:
        raise UsageError(f"{storage.root} is not empty and was not written by gd-train; choose another --out")


def made(storage: Storage, shard: int) -> int | None:
    """Examples of a shard that is whole; None where it is to be made."""
    try:
        record, masks = read_shard(storage, shard), read_masks_record(storage, shard)
    except (FileNotFoundError, DamagedShard):
        return None
    if masks is None:
        return None
    return None if damaged_file(storage, record["files"]) else len(record["rows"])


def write(
    storage: Storage, shard: int, first: int, images: Sequence[RealImage], base: FrozenBase, timestep: int, about: dict
) -> None:
    """Encode and write a shard, its record last."""
    latents = [encode(base, images[k : k + CALL]) for k in range(0, len(images), CALL)]
    shape = (0, base.unet.config.in_channels, 1, 1)
    files = [(latents_path(shard), npy(np.concatenate(latents) if latents else np.zeros(shape, np.float32)))]
    rows = []
    for k, real in enumerate(images):
        row, more = describe(first + k, real, timestep)
        rows.append(row)
        files += more
    scores = [np.ones(len(real.names)) for real in images]
    content, record = encode_masks(shard, [real.masks for real in images], scores, about)
    files += [(masks_path(shard), content), (masks_path(shard, "json"), record)]
    storage.commit(shard, files, encode_shard(shard, first, rows, files))


def describe(index: int, real: RealImage, timestep: int) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """(row, files) of an image."""
    stem = f"{subfolder(index)}/{sample_id(index)}"
    labels = np.zeros(real.image.shape[:2], np.uint8)
    for k, mask in enumerate(real.masks, 1):
        labels[mask] = k
    things = [
        dict(name=name, label=k, area=int(mask.sum()), box=mask_box(mask), score=1.0)
        for k, (name, mask) in enumerate(zip(real.names, real.masks, strict=True), 1)
    ]
    row = dict(
        id=sample_id(index), index=index, prompt=real.prompt, height=len(labels), width=labels.shape[1],
        capture_timestep=float(timestep), image=f"images/{stem}.png", mask=f"labels/{stem}.png", objects=things,
    )  # fmt: skip
    return row, [(row["image"], encode_image(real.image, None)), (row["mask"], encode_labels(labels))]


def encode(base: FrozenBase, images: Sequence[RealImage]) -> np.ndarray:
    """Clean latents float32 [B,4,h,w]."""
    pixels = torch.from_numpy(np.stack([real.image for real in images])).permute(0, 3, 1, 2)
    return base.encode(pixels.float() / 127.5 - 1).float().cpu().numpy()
