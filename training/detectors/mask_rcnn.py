"""torchvision's Mask R-CNN, the paper's own kind of detector; needs torchvision, which is not a dependency."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.detectors.base import Instance
from grounded_diffusion.training.fingerprint import weights_digest

INSIDE = 0.5  # probability above which a pixel is in an instance's mask


class MaskRcnn:
    """See base.Segmenter. The weights are torchvision's for COCO, fetched by torchvision at first use.

    Raises:
        UsageError: torchvision is not installed.
        CheckpointError: the weights cannot be fetched.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        try:
            from torchvision.models import detection
        except ImportError:
            raise UsageError(
                "mask-rcnn needs torchvision; pip install torchvision, or give a segmentation model of transformers"
            ) from None
        weights = detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1
        try:
            self.model = detection.maskrcnn_resnet50_fpn_v2(weights=weights)
        except Exception as error:  # of the network, of the disk
            raise CheckpointError(f"cannot fetch torchvision's Mask R-CNN: {error}") from None
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        unused = ("N/A", "__background__")
        self.labels = {k: name for k, name in enumerate(weights.meta["categories"]) if name not in unused}
        self.about = {"detector": "mask-rcnn", "weights": weights_digest(self.model)}

    @torch.inference_mode()
    def segment(self, images: np.ndarray, wanted: Sequence[Collection[int]]) -> list[list[Instance]]:
        tensors = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float() / 255
        results = []
        for output, labels in zip(self.model(list(tensors)), wanted, strict=True):
            masks = output["masks"][:, 0] > INSIDE  # [N,H,W]
            found = zip(output["labels"].tolist(), output["scores"].tolist(), masks.cpu().numpy(), strict=True)
            kept = [Instance(*one) for one in found if one[0] in labels and one[2].any()]
            results.append(sorted(kept, key=lambda one: -one.score))
        return results
