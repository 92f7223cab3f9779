"""The oracle: a small segmenter of rendered scenes, in the place of the paper's Mask R-CNN.

It is trained on rendered scenes, half of them through the autoencoder, so that generated images look
familiar to it. Two are trained: the `oracle`, which knows every name and judges; and the `labeller`, which
knows only the seen names and labels the images on which the grounding head is trained.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.engine.checks import first_line
from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.devices import fast_autocast
from grounded_diffusion.training.loop import step_generator, train
from grounded_diffusion.training.metrics import confusion, confusion_iou
from grounded_diffusion.training.scratch.config import TrainConfig
from grounded_diffusion.training.things.world import Scene, World

WIDTHS = (16, 32, 64, 128)


class Block(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection; [B,i,h,w] -> [B,o,h,w]."""

    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)
        self.skip = nn.Conv2d(inner, outer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(h + self.skip(x))


class Segmenter(nn.Module):
    """A U-Net from images [B,3,H,W] in [-1,1] to class logits [B,1+names,H,W]; class 0 is background."""

    def __init__(self, names: list[str], widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.names = list(names)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(Block(a, b) for a, b in pairs)
        self.up = nn.ModuleList(Block(a + b, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(widths[0], 1 + len(self.names), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, skips = self.stem(images), []
        for block in self.down:
            skips.append(x)
            x = block(F.avg_pool2d(x, 2))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], 1))
        return self.out(x)

    @torch.no_grad()
    def segment(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B,3,H,W] -> class map [B,H,W] int64."""
        device = images.device.type
        with fast_autocast(device):
            return self(images.contiguous(memory_format=torch.channels_last)).argmax(1)


def class_map(scene: Scene) -> torch.Tensor:
    """A scene's labels as classes [B,S,S] int64: 0 background, 1+i the i-th name of the world."""
    table = torch.cat([torch.full_like(scene.objects[:, :1], -1), scene.objects], 1) + 1
    return table.gather(1, scene.labels.flatten(1).long()).view(scene.labels.shape)


def class_iou(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Intersection over union per class [classes] from pooled counts; NaN where a class is absent."""
    return confusion_iou(confusion(predicted, truth, classes))


def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images through encode and decode, as generated ones come out."""
    with torch.no_grad(), fast_autocast(images.device.type):
        images = images.contiguous(memory_format=torch.channels_last)
        return vae.decode(vae.encode(images).latent_dist.sample()).sample.float().clamp(-1, 1)


def measure(segmenter: Segmenter, vae: AutoencoderKL, world: World, count: int = 256) -> tuple[float, float]:
    """mIoU in per cent over the names, on fresh renders and on their reconstructions."""
    scene, results = world.render(count, step_generator(11, 0), captions=False), []
    for images in (scene.images, torch.cat([reconstruct(vae, part) for part in scene.images.split(64)])):
        predicted = torch.cat([segmenter.segment(part) for part in images.split(64)])
        iou = class_iou(predicted, class_map(scene), 1 + len(world.names))
        results.append(100 * iou[1:].nanmean().item())
    return results[0], results[1]


def train_oracle(name: str, config: TrainConfig, folder: Path, device: str = "cpu") -> Segmenter:
    """Train the stage `oracle` (all names) or `labeller` (seen names) and save `folder/<name>.pt`."""
    stage = config.stages[name]
    torch.manual_seed(stage.seed)
    world = World(config.world, list(config.names if name == "oracle" else config.seen), device)
    if not (folder / "vae").is_dir():
        raise CheckpointError(f"{folder} has no vae; train it with gd-train base")
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device, memory_format=torch.channels_last).eval()
    segmenter = Segmenter(world.names).to(device, memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        scene = world.render(stage.batch, generator, captions=False)
        half = stage.batch // 2
        images = torch.cat([scene.images[:half], reconstruct(vae, scene.images[half:])])
        with fast_autocast(world.bank.device.type):
            logits = segmenter(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), class_map(scene))

    def sample(model: Segmenter, step: int) -> str:
        renders, reconstructions = measure(model, vae, world)
        return f"mIoU {renders:.2f} on renders, {reconstructions:.2f} on reconstructions"

    segmenter = train(name, segmenter, stage, folder, loss, sample)
    torch.save(dict(names=world.names, weights=segmenter.state_dict()), folder / f"{name}.pt")
    return segmenter


def load_oracle(file: Path) -> Segmenter:
    """A trained segmenter. Raises CheckpointError where there is none."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; train it with gd-train {file.stem}")
    try:
        saved = torch.load(file, weights_only=True)
        segmenter = Segmenter(saved["names"])
        segmenter.load_state_dict(saved["weights"])
    except Exception as error:  # pickle, zip files and tensors have many kinds
        raise CheckpointError(f"{file} is damaged ({first_line(error)}); train it with gd-train {file.stem}") from None
    return segmenter.to(memory_format=torch.channels_last).eval().requires_grad_(False)
