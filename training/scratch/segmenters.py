"""The labeller and the judge: two segmenters of the world's names, as checkpoints of transformers.

They stand in the place of the paper's Mask R-CNN. Both learn from rendered scenes, half of them through the
autoencoder, as generated images come out. The labeller is for `gd-train examples --detector`, the judge, which starts
from other weights and sees other scenes, for `gd-eval --detector`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.detectors.network import train_network
from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter
from grounded_diffusion.training.devices import fast_autocast
from grounded_diffusion.training.images import to_uint8
from grounded_diffusion.training.loop import step_generator
from grounded_diffusion.training.metrics import confusion, confusion_iou
from grounded_diffusion.training.scratch.config import TrainConfig
from grounded_diffusion.training.things.world import Scene, World

TEST = 256  # scenes that they are measured on


def class_map(scene: Scene) -> torch.Tensor:
    """A scene's labels as classes [B,S,S] int64: 0 background, 1+i the i-th name of the world."""
    table = torch.cat([torch.full_like(scene.objects[:, :1], -1), scene.objects], 1) + 1
    return table.gather(1, scene.labels.flatten(1).long()).view(scene.labels.shape)


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images through encode and decode, as generated ones come out."""
    with torch.no_grad(), fast_autocast(images.device.type):
        images = images.contiguous(memory_format=torch.channels_last)
        return vae.decode(vae.encode(images).latent_dist.sample()).sample.float().clamp(-1, 1)


def open_vae(config: TrainConfig, file: Path, folder: Path) -> AutoencoderKL:
    """The autoencoder of a run; else the one that it would start from, or of the checkpoint beside the configuration
    that was made by it. Raises CheckpointError.
    """
    for place in (folder, Path(config.init.get("vae", folder)), file.with_suffix("")):
        if (place / "vae").is_dir():
            return AutoencoderKL.from_pretrained(place / "vae").to(memory_format=torch.channels_last).eval()
    raise CheckpointError(f"{folder} has no vae; train it with gd-train base")


def train_segmenter(
    name: str, config: TrainConfig, file: Path, world: World, folder: Path, say: Callable[[str], None]
) -> TransformersSegmenter:
    """Train the stage `name`, write it to `folder/name/network`, and measure it. The same call goes on where it was.

    Args:
        name: "labeller" or "judge".
        file: where the configuration is.
    """
    stage, device = config.stages[name], world.bank.device
    vae = open_vae(config, file, folder).to(device)

    def draw(count: int, generator: torch.Generator, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        scene = world.render(count, generator, captions=False)
        plain = count - round(count * share)
        images = torch.cat([scene.images[:plain], reconstruct(vae, scene.images[plain:])]) if share else scene.images
        return to_uint8(images).numpy(), class_map(scene).to(torch.uint8).cpu().numpy()

    trained = train_network(None, stage, world.names, config.world.size, folder / name, draw, str(device), say)
    told = []
    for share, what in ((0.0, "renders"), (1.0, "reconstructions")):
        images, maps = draw(TEST, step_generator(11, 0), share)
        found = np.concatenate([trained.class_maps(images[k : k + 32]) for k in range(0, TEST, 32)])
        iou = confusion_iou(confusion(torch.from_numpy(found), torch.from_numpy(maps).long(), 1 + len(world.names)))
        told.append(f"{100 * iou[1:].nanmean().item():.2f} on {what}")
    say(f"{name}: mIoU {', '.join(told)}; in {folder / name / 'network'}")
    return trained
