"""What a user asks of a format. With the names that occur in the prompts it becomes the format's `Settings`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grounded_diffusion.engine.checks import check_float
from grounded_diffusion.engine.dataset.formats.common import Classes, Settings
from grounded_diffusion.engine.prompts.vocabulary import BUILT_IN, COCO_IDS, built_in, read_names
from grounded_diffusion.errors import UsageError

INSTANCES = ("class", "components")
LEAST_PART = 0.001  # of the image: 262 pixels at 512x512
WITHOUT_CLASSES = ("folder", "examples", "null")  # formats whose labels count the objects of a sample


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """Options of a format. A format that cannot have one of them refuses it.

    Attributes:
        names: class names, with ids from 1 in their order; or a file of them, or "voc", "coco" or "things-64". None
            takes the names of the objects, sorted.
        jpeg_quality: 1 to 100; None takes 95, and PNG where the data set is read again by us (see WITHOUT_CLASSES).
        png: images without loss; not together with jpeg_quality.
        void_border: pixels on either side of every edge to mark as 255.
        void_band: (low, high); pixels at which an object's probability lies between the two are marked as 255.
        polygons: COCO's instances as polygons instead of run lengths.
        instances: one of INSTANCES: one object a "class", or one for each of the connected "components" of its mask.
        instance_area: least share of the image that such a part covers; None takes LEAST_PART.

    Raises:
        UsageError: a value outside its range, or two that exclude each other.
    """

    names: str | Path | tuple[str, ...] | None = None
    jpeg_quality: int | None = None
    png: bool = False
    void_border: int = 0
    void_band: tuple[float, float] | None = None
    polygons: bool = False
    instances: str = INSTANCES[0]
    instance_area: float | None = None

    def __post_init__(self) -> None:
        if self.png and self.jpeg_quality is not None:
            raise UsageError("jpeg_quality is not for png; leave one of the two out", "jpeg_quality", "png")
        if self.instances not in INSTANCES:
            raise UsageError(f"instances must be one of {', '.join(INSTANCES)}, not {self.instances!r}", "instances")
        if self.instance_area is not None:
            check_float(self.instance_area, "instance_area", 0, 1)
            if self.instances != "components":
                line = "instance_area is of `instances` components; leave one of the two out"
                raise UsageError(line, "instance_area", "instances")
        if self.names is not None and not isinstance(self.names, str | Path):
            object.__setattr__(self, "names", tuple(self.names))
        if self.void_band is not None:
            object.__setattr__(self, "void_band", tuple(self.void_band))
        self.settings("null")  # raises for what is outside its range

    def settings(self, format: str, classes: Classes | None = None) -> Settings:
        """How `format` is to write. Raises UsageError."""
        quality = self.jpeg_quality
        if quality is None and not self.png and format not in WITHOUT_CLASSES:
            quality = 95
        least = None
        if self.instances == "components":
            least = LEAST_PART if self.instance_area is None else float(self.instance_area)
        return Settings(classes or Classes(()), quality, self.void_border, self.void_band, self.polygons, least)

    def classes(self, format: str) -> Classes | None:
        """The classes, where they do not depend on the names of the objects. Raises UsageError."""
        if format in WITHOUT_CLASSES:
            if self.names is not None:
                raise UsageError(f"{format} has no class ids, so it takes no `names`; leave it out", "names")
            return Classes(())
        if self.names is None:
            return None
        if isinstance(self.names, tuple):
            return Classes(self.names)
        if self.names in BUILT_IN:
            return Classes(built_in(str(self.names)).names, COCO_IDS if self.names == "coco" else ())
        return Classes(read_names(self.names))


def sorted_classes(found: Iterable[str]) -> Classes:
    """The classes of the objects that were found."""
    return Classes(tuple(sorted(set(found))))
