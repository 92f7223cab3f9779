"""Data sets in the formats that training code reads, one module a format."""

from __future__ import annotations

import importlib
from pathlib import Path

from grounded_diffusion.engine.formats.common import Settings, Writer
from grounded_diffusion.errors import UsageError

# format -> where its writer is. Modules are imported when used, since Parquet needs an optional package.
WRITERS = {
    "voc": ("voc", "VocWriter"),
    "coco": ("coco", "CocoWriter"),
    "coco-panoptic": ("panoptic", "PanopticWriter"),
    "mmseg": ("mmseg", "MmsegWriter"),
    "webdataset": ("webdataset", "WebDatasetWriter"),
    "hf-imagefolder": ("imagefolder", "ImageFolderWriter"),
    "hf-parquet": ("parquet", "ParquetWriter"),
    "yolo-seg": ("yolo", "YoloWriter"),
}
WITHOUT_VOID = ("coco", "coco-panoptic", "yolo-seg")


def open_writer(format: str, folder: Path, settings: Settings) -> Writer:
    """The writer of a format into an empty folder. Raises UsageError for settings that the format cannot have."""
    if format not in WRITERS:
        raise UsageError(f"there is no format {format!r}; known are {', '.join(WRITERS)}")
    if settings.void_border and format in WITHOUT_VOID:
        raise UsageError(f"{format} has no void pixels; leave --void-border out")
    if settings.polygons and format != "coco":
        raise UsageError(f"--polygons is for coco, not {format}")
    if format == "voc" and settings.jpeg_quality is None:
        raise UsageError("VOC's readers look for .jpg images; leave --png out")
    module, name = WRITERS[format]
    module = importlib.import_module(f"grounded_diffusion.engine.formats.{module}")
    return getattr(module, name)(folder, settings)
