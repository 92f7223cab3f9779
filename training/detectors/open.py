"""The kinds of detectors by name."""

from __future__ import annotations

from pathlib import Path

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.detectors.base import Segmenter
from grounded_diffusion.training.detectors.mask_rcnn import MaskRcnn
from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter
from grounded_diffusion.training.devices import check_device
from grounded_diffusion.training.hub import HUB_NAME

MASK_RCNN = "mask-rcnn"


def open_segmenter(source: str, device: str = "cpu") -> Segmenter:
    """A segmenter: "mask-rcnn", a directory of transformers', or a name on the hub ("owner/name").

    Raises:
        UsageError, CheckpointError: there is none, or it cannot be loaded.
    """
    check_device(device)
    if source == MASK_RCNN:
        return MaskRcnn(device)
    local = Path(source).exists() or not HUB_NAME.fullmatch(source)
    if local and not (Path(source) / "config.json").is_file():
        raise CheckpointError(
            f"{source} is no detector: it has no config.json; give a directory that transformers wrote, a hub name "
            f"(owner/name), or {MASK_RCNN}"
        )
    return TransformersSegmenter(source, device)
