"""Any segmentation checkpoint of transformers: semantic, instance, panoptic or universal, from a folder or a hub.

Two kinds of output cover them all. Query models (Mask2Former, MaskFormer, OneFormer, EoMT, DETR, RF-DETR) give a label
and a mask a query; every query is an instance. Semantic ones (SegFormer, UPerNet, DPT, BEiT, MobileViT, ...) give
logits a label; the pixels of a label are one instance, whose score is the mean probability in it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.detectors.base import Instance
from grounded_diffusion.training.fingerprint import weights_digest

QUERY_MODELS = ("detr", "eomt", "eomt_dinov3", "mask2former", "maskformer", "oneformer", "rf_detr")
INDEPENDENT = ("rf_detr",)  # each label's probability by itself; the others' end in one for "nothing"
TASK = "the task is instance"  # what OneFormer is told


class TransformersSegmenter:
    """See base.Segmenter.

    Args:
        source: a directory that transformers' `save_pretrained` wrote, or the name of a model on the hub.
        device: where it runs.

    Raises:
        CheckpointError: not such a model, unreadable, or with missing tensors, which are listed.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model, self.processor = load(str(source))
        self.model.to(self.device).eval().requires_grad_(False)
        config = self.model.config
        self.labels = {int(k): label for k, label in config.id2label.items()}
        self.by_query = config.model_type in QUERY_MODELS
        self.task = task_tokens(source, config, self.device)
        self.about = {"detector": config.model_type, "weights": weights_digest(self.model)}

    def segment(self, images: np.ndarray, wanted: Sequence[Collection[int]]) -> list[list[Instance]]:
        outputs, cut = self._run(images)
        read = self._queries if self.by_query else self._pixels
        return [
            sorted(read(outputs, b, cut, image.shape[:2], set(labels)), key=lambda one: -one.score)
            for b, (image, labels) in enumerate(zip(images, wanted, strict=True))
        ]

    @torch.inference_mode()
    def class_maps(self, images: np.ndarray) -> np.ndarray:
        """The likeliest label of every pixel: images uint8 [B,H,W,3] -> int64 [B,H,W]."""
        outputs, cut = self._run(images)
        if self.by_query:
            logits, masks = queries_of(outputs)
            shares = logits.softmax(-1)[..., :-1]  # the last is for nothing
            values = torch.einsum("bqc,bqhw->bchw", shares, masks.sigmoid())
        else:
            values = outputs.logits
        return np.stack([fit(one, cut, images.shape[1:3]).argmax(0).cpu().numpy() for one in values])

    @torch.inference_mode()
    def _run(self, images: np.ndarray) -> tuple[Any, tuple[float, float]]:
        """The model's output, and which part of its height and width is image; the rest is padding."""
        # Channels last is said, not guessed: an image three pixels high looks like channels first.
        inputs = self.processor(list(images), return_tensors="pt", input_data_format="channels_last")
        pixels = inputs["pixel_values"].to(self.device)
        given = {"pixel_values": pixels}
        cut = (1.0, 1.0)
        if (mask := inputs.get("pixel_mask")) is not None:
            given["pixel_mask"] = mask.to(self.device)
            cut = (mask[0].any(1).float().mean().item(), mask[0].any(0).float().mean().item())
        if self.task is not None:
            given["task_inputs"] = self.task.expand(len(images), -1)
        return self.model(**given), cut

    def _queries(self, outputs, b: int, cut, size, wanted: set[int]) -> list[Instance]:
        """Every query whose best label is wanted."""
        logits, masks = queries_of(outputs)
        independent = self.model.config.model_type in INDEPENDENT
        scores, labels = (logits[b].sigmoid() if independent else logits[b].softmax(-1)).max(-1)
        keep = [q for q, label in enumerate(labels.tolist()) if label in wanted]
        if not keep:
            return []
        inside = (fit(masks[b, keep], cut, size) > 0).cpu().numpy()  # a probability above 0.5
        found = zip(labels[keep].tolist(), scores[keep].tolist(), inside, strict=True)
        return [Instance(label, score, mask) for label, score, mask in found if mask.any()]

    def _pixels(self, outputs, b: int, cut, size, wanted: set[int]) -> list[Instance]:
        """Every wanted label that some pixel has."""
        probability, labels = fit(outputs.logits[b], cut, size).softmax(0).max(0)  # [H,W]
        found = []
        for label in wanted & set(labels.unique().tolist()):
            mask = labels == label
            found.append(Instance(label, probability[mask].mean().item(), mask.cpu().numpy()))
        return found


def queries_of(outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B,Q,labels and nothing] and masks [B,Q,h,w] of a query model."""
    if "logits" in outputs:
        return outputs.logits, outputs.pred_masks
    return outputs.class_queries_logits, outputs.masks_queries_logits


def fit(logits: torch.Tensor, cut: tuple[float, float], size: tuple[int, int]) -> torch.Tensor:
    """Logits [C,h,w] of a padded image -> those of the image itself [C,H,W], float32."""
    h, w = logits.shape[1:]
    kept = logits[:, : max(1, round(h * cut[0])), : max(1, round(w * cut[1]))]
    return F.interpolate(kept[None].float(), size, mode="bilinear", align_corners=False)[0]


def load(source: str) -> tuple[torch.nn.Module, Any]:
    """A segmentation model in float32 and its image processor. No file is run as code. Raises CheckpointError."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        kind = model_class(config)
        if kind is None:
            raise CheckpointError(
                f"{source} is a {config.model_type} model that does not segment; give a checkpoint for semantic, "
                "instance, panoptic or universal segmentation"
            )
        more = {"class_info_file": None} if config.model_type == "oneformer" else {}  # it would be fetched
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **more)
        model, report = kind.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises a dozen kinds for unreadable files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise CheckpointError(f"cannot load the detector {source}: {reason}") from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"the detector {source} lacks {len(missing)} tensors: {', '.join(missing)}")
    return model, processor


def model_class(config) -> type | None:
    """The class of a segmentation model with this configuration: what it was saved as, else what fits its type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
        auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
        auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    )
    known = [table[config.model_type] for table in tables if config.model_type in table]
    saved = [name for name in getattr(config, "architectures", None) or () if name in known]
    name = next(iter([*saved, *known]), None)
    return name and getattr(transformers, name)


def task_tokens(source: str | Path, config, device: torch.device) -> torch.Tensor | None:
    """OneFormer's task as token ids [1,L]; None for other models."""
    if config.model_type != "oneformer":
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise CheckpointError(f"cannot load the tokenizer of the detector {source}: {error}") from None
    options = dict(padding="max_length", max_length=config.task_seq_len, truncation=True, return_tensors="pt")
    return tokenizer([TASK], **options).input_ids.to(device)
