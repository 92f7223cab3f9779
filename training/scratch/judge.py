"""The judge: a segmenter of the world's names as a checkpoint of transformers, for `gd-eval --detector`.

It learns from rendered scenes, half of them through the autoencoder, and is of another family than the oracle that
labels and chooses in training, so that what one overlooks the other does not.
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
from grounded_diffusion.training.images import to_uint8
from grounded_diffusion.training.loop import step_generator
from grounded_diffusion.training.scratch.config import TrainConfig
from grounded_diffusion.training.scratch.oracle import class_iou, class_map, reconstruct
from grounded_diffusion.training.things.world import World

TEST = 256  # scenes that it is measured on


def open_vae(config: TrainConfig, file: Path, folder: Path) -> AutoencoderKL:
    """The autoencoder of a run; else the one that it would start from, or of the checkpoint beside the configuration
    that was made by it. Raises CheckpointError.
    """
    for place in (folder, Path(config.init.get("vae", folder)), file.with_suffix("")):
        if (place / "vae").is_dir():
            return AutoencoderKL.from_pretrained(place / "vae").to(memory_format=torch.channels_last).eval()
    raise CheckpointError(f"{folder} has no vae; train it with gd-train base")


def train_judge(
    config: TrainConfig, file: Path, world: World, folder: Path, say: Callable[[str], None]
) -> TransformersSegmenter:
    """Train the judge, write it to `folder/judge`, and measure it. The same call goes on where it was stopped.

    Args:
        file: where the configuration is.
    """
    stage, device = config.stages["judge"], world.bank.device
    vae = open_vae(config, file, folder).to(device)

    def draw(count: int, generator: torch.Generator, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
        scene = world.render(count, generator, captions=False)
        plain = count - round(count * share)
        images = torch.cat([scene.images[:plain], reconstruct(vae, scene.images[plain:])]) if share else scene.images
        return to_uint8(images).numpy(), class_map(scene).to(torch.uint8).cpu().numpy()

    judge = train_network(None, stage, world.names, config.world.size, folder / "judge", draw, str(device), say)
    told = []
    for share, what in ((0.0, "renders"), (1.0, "reconstructions")):
        images, maps = draw(TEST, step_generator(11, 0), share)
        found = np.concatenate([judge.class_maps(images[k : k + 32]) for k in range(0, TEST, 32)])
        iou = class_iou(torch.from_numpy(found), torch.from_numpy(maps).long(), 1 + len(world.names))
        told.append(f"{100 * iou[1:].nanmean().item():.2f} on {what}")
    say(f"judge: mIoU {', '.join(told)}; in {folder / 'judge' / 'network'}")
    return judge
