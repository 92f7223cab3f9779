"""Segmentation networks of transformers that learn from images and class maps: a small one, or any checkpoint.

In a class map 0 is the background, 1 the first name, and IGNORED counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from grounded_diffusion.engine.checks import check_int
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter, load, model_class
from grounded_diffusion.training.devices import fast_autocast
from grounded_diffusion.training.loop import StageConfig, train

BACKGROUND, IGNORED = "background", 255
BY_MASK = ("maskformer", "mask2former")  # universal models that are trained by a mask and a label a class
BY_PIXEL = ("semantic_loss_ignore_index", "loss_ignore_index")  # what the configuration of a semantic model has
Draw = Callable[[int, torch.Generator], tuple[np.ndarray, np.ndarray]]  # (count, generator) -> images, class maps
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Network:
    """Which network, and how it is trained.

    Attributes:
        source: checkpoint of transformers that it starts from, a directory or a hub name; None for a small UPerNet on
            a ConvNeXt (Xiao et al., 2018; Liu et al., 2022), from scratch.
        iterations, batch: of the training.

    Raises:
        UsageError: a number outside its range.
    """

    source: str | None = None
    iterations: int = 40_000
    batch: int = 8

    def __post_init__(self):
        check_int(self.iterations, "network_iterations", 1, 10**8)
        check_int(self.batch, "network_batch", 1, 10**6)

    @property
    def stage(self) -> StageConfig:
        """The paper's AdamW for a checkpoint; from scratch, Muon needs far fewer steps."""
        pace = dict(steps=self.iterations, batch=self.batch, save_every=200, sample_every=self.iterations)
        if self.source:
            return StageConfig(lr=1e-4, muon_lr=0.0, weight_decay=1e-4, cooldown=1.0, **pace)
        return StageConfig(lr=1.5e-3, muon_lr=0.02, cooldown=0.8, **pace)


def open_network(source: str | None, names: Sequence[str], side: int):
    """(model, image processor) for these names and the background, of images with sides of about so many pixels.

    Args:
        source: see Network.

    Raises:
        CheckpointError, UsageError: the checkpoint cannot be read, or not be trained on class maps.
    """
    import transformers

    labels = dict(enumerate((BACKGROUND, *names)))
    heads = dict(id2label=labels, label2id={label: k for k, label in labels.items()})
    if source is None:
        # Small images keep every pixel in the first stage.
        backbone = transformers.ConvNextConfig(
            patch_size=max(1, side // 64), hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], image_size=side,
            layer_scale_init_value=1.0, out_features=[f"stage{k}" for k in (1, 2, 3, 4)],
        )  # fmt: skip
        config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=32, use_auxiliary_head=False, **heads)
        size = {"height": side, "width": side}
        return transformers.UperNetForSemanticSegmentation(config), transformers.SegformerImageProcessorPil(size=size)
    known, processor = load(source)
    if known.config.model_type not in BY_MASK and not any(hasattr(known.config, name) for name in BY_PIXEL):
        raise UsageError(
            f"{source} is a {known.config.model_type} model, which is not trained on class maps here; give a "
            "semantic one (SegFormer, UPerNet, ...), MaskFormer or Mask2Former"
        )
    model = model_class(known.config).from_pretrained(source, ignore_mismatched_sizes=True, **heads)
    return model.float(), processor


def train_network(
    source: str | None, stage: StageConfig, names: Sequence[str], side: int, folder: Path, draw: Draw, device: str,
    say: Say,
) -> TransformersSegmenter:  # fmt: skip
    """Train a network, write it to `folder/network` as transformers does, and open it. The same call goes on.

    Args:
        source: see Network.
        stage: length and pace.
        draw: gives images, uint8 [B,H,W,3], and their class maps, uint8 [B,H,W].
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    done = folder / "network"
    if not (done / "config.json").is_file():
        torch.manual_seed(stage.seed)
        model, processor = open_network(source, names, side)
        model.to(device, memory_format=torch.channels_last).train()

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            images, maps = draw(stage.batch, generator)
            inputs = processor(list(images), return_tensors="pt", input_data_format="channels_last")
            inputs = {key: inputs[key].to(device) for key in ("pixel_values", "pixel_mask") if key in inputs}
            with fast_autocast(torch.device(device).type):
                return model(**inputs, **targets(model, maps, inputs)).loss.float()

        say(f"training a {model.config.model_type} on {stage.steps} x {stage.batch} images, in {folder}")
        train("network", model, stage, folder, loss)
        processor.save_pretrained(done)
        model.save_pretrained(done)
    return TransformersSegmenter(done, device)


def targets(model: torch.nn.Module, maps: np.ndarray, inputs: dict[str, torch.Tensor]) -> dict:
    """What a model is trained on beside its inputs, of class maps uint8 [B,H,W], at the size of its inputs."""
    pixels = inputs["pixel_values"]
    labels = torch.full((len(maps), *pixels.shape[-2:]), IGNORED)
    for b, one in enumerate(maps):
        size = pixels.shape[-2:]
        if "pixel_mask" in inputs:  # the rest is padding
            size = tuple(int(inputs["pixel_mask"][b].any(dim).sum()) for dim in (1, 0))
        fitted = F.interpolate(torch.from_numpy(one)[None, None].float(), size, mode="nearest-exact")
        labels[b, : size[0], : size[1]] = fitted[0, 0].long()
    labels = labels.to(pixels.device)
    if model.config.model_type not in BY_MASK:
        return {"labels": labels}
    classes = [one.unique()[one.unique() != IGNORED] for one in labels]
    masks = [(one == found[:, None, None]).float() for one, found in zip(labels, classes, strict=True)]
    return {"mask_labels": masks, "class_labels": classes}
