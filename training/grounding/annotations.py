"""Real images with masks: a Pascal VOC devkit or a COCO file, as (image, mask of each class) one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from grounded_diffusion.engine.prompts.vocabulary import VOC_NAMES
from grounded_diffusion.errors import UsageError

VOID = 255  # VOC's label of pixels that belong to no class


class Annotations(Protocol):
    """Images with the masks of their classes.

    Attributes:
        labels: class names by id.
        about: what it is, for the records of masks.
    """

    labels: Mapping[int, str]
    about: dict[str, Any]

    def __len__(self) -> int: ...

    def read(self, k: int) -> tuple[Image.Image, dict[int, np.ndarray]]:
        """The k-th image in RGB, and a mask, bool [H,W], of each class in it. Raises UsageError for a bad file."""
        ...


@dataclass(frozen=True, slots=True)
class VocFolder:
    """`VOCdevkit/VOC2012` or any folder of its form. Custom classes are in its labelmap.txt, `name:r,g,b::` a line.

    Raises:
        UsageError: no list of the part, or no folder of class masks.
    """

    folder: Path
    labels: Mapping[int, str]
    stems: tuple[str, ...]
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, part: str = "train") -> VocFolder:
        listing = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
        for needed in (folder / "JPEGImages", folder / "SegmentationClass", listing):
            if not needed.exists():
                raise UsageError(
                    f"{folder} is no VOC folder for segmentation: it has no {needed.relative_to(folder)}; give the "
                    "folder that holds JPEGImages, SegmentationClass and ImageSets, such as VOCdevkit/VOC2012"
                )
        stems = tuple(listing.read_text(encoding="utf-8").split())
        if not stems:
            raise UsageError(f"{listing} is empty; write the stem of an image on each line")
        return cls(folder, voc_labels(folder / "labelmap.txt"), stems, {"annotations": f"{folder.name} {part}"})

    def __len__(self) -> int:
        return len(self.stems)

    def read(self, k: int) -> tuple[Image.Image, dict[int, np.ndarray]]:
        image = open_image(self.folder / "JPEGImages" / f"{self.stems[k]}.jpg").convert("RGB")
        file = self.folder / "SegmentationClass" / f"{self.stems[k]}.png"
        classes = np.asarray(open_image(file))
        if classes.shape != image.size[::-1]:
            raise UsageError(f"{file} is no class mask of its image: it has the shape {list(classes.shape)}")
        present = set(np.unique(classes).tolist()) - {0, VOID}
        return image, {label: classes == label for label in present if label in self.labels}


def voc_labels(file: Path) -> dict[int, str]:
    """VOC's classes by id, or those of a labelmap.txt, whose first line is the background."""
    if not file.is_file():
        return dict(enumerate(VOC_NAMES, 1))
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
    return {k: line.partition(":")[0].strip() for k, line in enumerate(lines) if k}


@dataclass(frozen=True, slots=True)
class CocoFile:
    """A COCO file of instances with its folder of images. Crowds count to their class.

    Raises:
        UsageError: the file or the folder is not there, or not of that form.
    """

    folder: Path
    labels: Mapping[int, str]
    images: tuple[dict[str, Any], ...]
    by_image: Mapping[int, list[dict[str, Any]]]
    about: dict[str, Any]

    @classmethod
    def open(cls, file: Path, folder: Path) -> CocoFile:
        if not folder.is_dir():
            raise UsageError(f"there is no folder of images at {folder}; give it with --images")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            labels = {entry["id"]: entry["name"] for entry in content["categories"]}
            images = tuple({key: entry[key] for key in ("id", "file_name")} for entry in content["images"])
            by_image: dict[int, list[dict[str, Any]]] = {}
            for entry in content["annotations"]:
                by_image.setdefault(entry["image_id"], []).append(
                    {"label": entry["category_id"], "segmentation": entry["segmentation"]}
                )
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{file} is no COCO file of instances: {type(error).__name__} {error}") from None
        images = tuple(image for image in images if image["id"] in by_image)
        if not images:
            raise UsageError(f"{file} has no image with an annotation")
        return cls(folder, labels, images, by_image, {"annotations": file.name})

    def __len__(self) -> int:
        return len(self.images)

    def read(self, k: int) -> tuple[Image.Image, dict[int, np.ndarray]]:
        entry = self.images[k]
        image = open_image(self.folder / entry["file_name"]).convert("RGB")
        masks: dict[int, np.ndarray] = {}
        for annotation in self.by_image[entry["id"]]:
            mask = draw(annotation["segmentation"], image.size, f"an annotation of {entry['file_name']}")
            label = annotation["label"]
            masks[label] = masks[label] | mask if label in masks else mask
        return image, masks


def draw(segmentation: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """A COCO segmentation, polygons or run lengths, as bool [H,W]; `size` is (W, H). Raises UsageError."""
    if isinstance(segmentation, list):
        canvas = Image.new("1", size)
        for polygon in segmentation:
            if len(polygon) >= 6:
                ImageDraw.Draw(canvas).polygon(list(map(float, polygon)), fill=1)
        return np.asarray(canvas)
    try:
        counts = segmentation["counts"]
        runs = list(expand(counts)) if isinstance(counts, str) else counts
        height, width = segmentation["size"]
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(width, height).T
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{where} is neither polygons nor run lengths") from None


def expand(counts: str) -> Iterator[int]:
    """Run lengths of cocoapi's compressed string; the reverse of formats/rle.py's `compress`."""
    runs: list[int] = []
    at = 0
    while at < len(counts):
        value = shift = 0
        more = True
        while more:
            group = ord(counts[at]) - 48
            value |= (group & 0x1F) << shift
            more, at, shift = bool(group & 0x20), at + 1, shift + 5
        if group & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    yield from runs


def open_image(file: Path) -> Image.Image:
    """A picture, loaded. Raises UsageError."""
    try:
        image = Image.open(file)
        image.load()
        return image
    except FileNotFoundError:
        raise UsageError(f"there is no image {file}; restore it, or take it out of the list") from None
    except OSError as error:
        raise UsageError(f"cannot read the image {file}: {error}") from None
