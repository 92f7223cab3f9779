"""Data sets in the formats that training code reads, one module a format."""

from __future__ import annotations

import importlib

from grounded_diffusion.engine.dataset.formats.common import Classes, Encoded, Format, Settings
from grounded_diffusion.engine.dataset.formats.options import WITHOUT_CLASSES, FormatOptions
from grounded_diffusion.errors import UsageError

__all__ = [
    "FORMATS",
    "WITHOUT_CLASSES",
    "WITHOUT_SPLITS",
    "Classes",
    "Encoded",
    "Format",
    "FormatOptions",
    "Settings",
    "open_format",
]

# format -> where it is. Modules are imported when used, since Parquet needs an optional package.
FORMATS = {
    "folder": ("folder", "FolderFormat"),
    "voc": ("voc", "VocFormat"),
    "coco": ("coco", "CocoFormat"),
    "coco-panoptic": ("panoptic", "PanopticFormat"),
    "mmseg": ("mmseg", "MmsegFormat"),
    "webdataset": ("webdataset", "WebDatasetFormat"),
    "hf-imagefolder": ("imagefolder", "ImageFolderFormat"),
    "hf-parquet": ("parquet", "ParquetFormat"),
    "yolo": ("yolo", "YoloFormat"),
    "yolo-seg": ("yolo", "YoloSegFormat"),
    "examples": ("examples", "ExamplesFormat"),
    "null": ("common", "NullFormat"),
}
WITHOUT_SPLITS = ("examples", "null")
WITH_INSTANCES = ("coco", "coco-panoptic", "yolo", "yolo-seg")
WITHOUT_VOID = ("coco", "yolo", "yolo-seg", "examples", "null")


def open_format(name: str, settings: Settings) -> Format:
    """A format by name. Raises UsageError for settings that it cannot have, or a package that it lacks."""
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}; known are {', '.join(FORMATS)}")
    if (settings.void_border or settings.void_band) and name in WITHOUT_VOID:
        field = "void_border" if settings.void_border else "void_band"
        raise UsageError(f"{name} has no void pixels; leave {field} out", field)
    if settings.polygons and name != "coco":
        raise UsageError(f"polygons is for coco, not {name}", "polygons")
    if settings.instances is not None and name not in WITH_INSTANCES:
        raise UsageError(f"`instances` are for {', '.join(WITH_INSTANCES)}, not {name}", "instances")
    if name == "voc" and settings.jpeg_quality is None:
        raise UsageError("VOC's readers look for .jpg images; leave png out", "png")
    module, kind = FORMATS[name]
    module = importlib.import_module(f"grounded_diffusion.engine.dataset.formats.{module}")
    return getattr(module, kind)(settings)
