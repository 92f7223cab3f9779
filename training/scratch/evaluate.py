"""Protocol-I on rendered scenes: does the base model draw what is asked, and does the head find it?

Every figure is measured on generated images against the raw oracle, which was trained on rendered scenes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from grounded_diffusion.engine.checks import first_line
from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig, upsample_logits
from grounded_diffusion.training.head.taps import Taps
from grounded_diffusion.training.images import save_grid
from grounded_diffusion.training.loop import step_generator
from grounded_diffusion.training.metrics import grid_ceiling
from grounded_diffusion.training.scratch.config import TrainConfig, table_errors
from grounded_diffusion.training.scratch.head import BaseModel, object_masks
from grounded_diffusion.training.scratch.oracle import load_oracle, measure, reconstruct
from grounded_diffusion.training.scratch.vae import psnr
from grounded_diffusion.training.things.world import World

IMAGES_PER_NAME = 12
PAIRS = 240
SEED = 20_000
LEAST_AREA = 0.02  # share of the image that a found object covers
LEAST_SHARE = 0.5  # share of the oracle's foreground that carries the prompted name


def load_head(base: BaseModel, config: TrainConfig, folder: Path) -> GroundingHead:
    """The trained head of a run, in evaluation mode."""
    if not (folder / "head.pt").is_file():
        raise CheckpointError(f"{folder} has no head.pt; train it with gd-train head")
    with table_errors("head"):
        head = GroundingHead(HeadConfig.for_unet(base.unet.config, text_dim=base.empty.shape[-1], **config.head))
    try:
        head.load_state_dict(torch.load(folder / "head.pt", weights_only=True)["weights"])
    except Exception as error:  # pickle, zip files and tensors have many kinds
        line = f"{folder / 'head.pt'} is damaged ({first_line(error)}); train it with gd-train head"
        raise CheckpointError(line) from None
    return head.to(base.device).eval().requires_grad_(False)


def found(classes: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Whether the oracle found each object [B,O]: it covers enough of the image and of the foreground."""
    area = masks.flatten(2).float().mean(2)
    foreground = (classes > 0).flatten(1).float().mean(1, keepdim=True)
    objects = masks.flatten(2).any(2).sum(1, keepdim=True).clamp(min=1)
    return (area >= LEAST_AREA) & (area >= LEAST_SHARE * foreground / objects)


def pooled_iou(predicted: torch.Tensor, truth: torch.Tensor, index: torch.Tensor, names: int) -> torch.Tensor:
    """Per-class sum of intersections over sum of unions [names] of masks [M,H,W]; NaN where a class is absent."""
    both = torch.zeros(names, dtype=torch.double).index_add_(0, index, (predicted & truth).sum((1, 2)).double())
    either = torch.zeros(names, dtype=torch.double).index_add_(0, index, (predicted | truth).sum((1, 2)).double())
    return both / either


class Evaluation:
    """The models of one run and the measurements on images generated from prompts."""

    def __init__(self, config: TrainConfig, world: World, folder: Path):
        self.names, self.seen = list(config.names), set(config.seen)
        self.base = BaseModel(folder, world.bank.device)
        self.head = load_head(self.base, config, folder)
        self.oracle = load_oracle(folder / "oracle.pt").to(self.base.device)
        self.queries = self.base.queries(self.names)

    @torch.no_grad()
    def run(self, objects: torch.Tensor, seed: int):
        """Generate one image for every row of name indices [B,O] -> images, oracle classes and masks, head masks.

        A last query, of a name that is not in the prompt, is appended to the head's: its mask should be empty.
        """
        parts = []
        for number, rows in enumerate(objects.split(56)):
            prompts = ["a photograph of " + " and ".join(f"a {self.names[i]}" for i in row) for row in rows.tolist()]
            images, latents = self.base.sample(prompts, step_generator(seed, number), steps=25)
            absent = (rows[:, :1] + 7) % len(self.names)
            absent = torch.where((rows == absent).any(1, keepdim=True), (absent + 1) % len(self.names), absent)
            queries = self.queries[torch.cat([rows, absent], 1)]
            with Taps(self.base.unet) as taps:
                features = self.base.features(latents, prompts, taps)
            logits = self.head(features, queries, torch.ones(queries.shape[:2], dtype=torch.bool))
            masks = upsample_logits(logits, images.shape[-2:]) > 0
            classes = self.oracle.segment(images)
            parts.append((images, classes, object_masks(classes, rows), masks))
        return (torch.cat(column) for column in zip(*parts, strict=True))


def singles(evaluation: Evaluation, folder: Path) -> dict:
    """One-object prompts over all names."""
    names = evaluation.names
    objects = torch.arange(len(names)).repeat_interleave(IMAGES_PER_NAME)[:, None]
    images, classes, truth, masks = evaluation.run(objects, SEED)
    hit = found(classes, truth)[:, 0]
    index, truth, predicted, absent = objects[hit, 0], truth[hit, 0], masks[hit, 0], masks[hit, 1]
    per_class = pooled_iou(predicted, truth, index, len(names))
    per_image = (predicted & truth).sum((1, 2)) / (predicted | truth).sum((1, 2)).clamp(min=1)
    seen = torch.tensor([name in evaluation.seen for name in names])
    overlay(images[::IMAGES_PER_NAME], masks[::IMAGES_PER_NAME, 0], folder / "evaluation.webp")
    cells = evaluation.base.unet.config.sample_size
    return {
        "images": len(objects),
        "found": hit.float().mean().item(),
        "found_per_name": {n: hit[objects[:, 0] == i].float().mean().item() for i, n in enumerate(names)},
        "miou_seen": per_class[seen].nanmean().item(),
        "miou_unseen": per_class[~seen].nanmean().item(),
        "iou_per_image_seen": per_image[seen[index]].mean().item(),
        "iou_per_image_unseen": per_image[~seen[index]].mean().item(),
        "iou_per_name": {n: per_class[i].item() for i, n in enumerate(names) if per_class[i] >= 0},
        "absent_query_area": absent.float().mean().item(),
        "latent_grid_ceiling": grid_ceiling(truth, cells),
    }


def pairs(evaluation: Evaluation) -> dict:
    """Two-object prompts, grouped by how many of the two names the head has seen."""
    names = evaluation.names
    generator = step_generator(SEED, 1)
    objects = torch.stack([torch.randperm(len(names), generator=generator)[:2] for _ in range(PAIRS)])
    _, classes, truth, masks = evaluation.run(objects, SEED + 1)
    both = found(classes, truth).all(1)
    seen = torch.tensor([name in evaluation.seen for name in names])
    iou = lambda a, b: (a & b).sum((-1, -2)) / (a | b).sum((-1, -2)).clamp(min=1)
    straight, swapped = iou(masks[:, :2], truth).sum(1), iou(masks[:, :2].flip(1), truth).sum(1)
    result = {"images": PAIRS, "both_found": both.float().mean().item()}
    result["swap_rate"] = (swapped > straight)[both].float().mean().item()
    for group, count in (("seen", 2), ("mixed", 1), ("unseen", 0)):
        rows = both & (seen[objects].sum(1) == count)
        predicted, wanted = masks[rows, :2].flatten(0, 1), truth[rows].flatten(0, 1)
        per_class = pooled_iou(predicted, wanted, objects[rows].flatten(), len(names))
        result[group] = {"images": int(rows.sum()), "miou": per_class.nanmean().item()}
    return result


def overlay(images: torch.Tensor, masks: torch.Tensor, file: Path) -> None:
    """A sheet of images above the same images with everything outside the mask dimmed."""
    dimmed = torch.where(masks[:, None], images, images * 0.25 - 0.6)
    columns = next(n for n in (10, 7, 6, 5, 4, 1) if len(images) % n == 0)
    rows = [row for pair in zip(images.split(columns), dimmed.split(columns), strict=True) for row in pair]
    save_grid(torch.cat(rows), file, columns)


def evaluate(config: TrainConfig, world: World, folder: Path) -> dict:
    """Measure everything, write `evaluation.json` and `evaluation.webp`, and print the table."""
    evaluation = Evaluation(config, world, folder)
    renders, reconstructions = measure(evaluation.oracle, evaluation.base.vae, world)
    scene = world.render(64, step_generator(SEED, 0), captions=False).images
    result = {
        "vae_psnr": psnr(reconstruct(evaluation.base.vae, scene), scene),
        "oracle": {"miou_renders": renders / 100, "miou_reconstructions": reconstructions / 100},
        "one": singles(evaluation, folder),
        "two": pairs(evaluation),
    }
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    one, two = result["one"], result["two"]
    print(f"oracle mIoU: {renders:.1f} on renders, {reconstructions:.1f} on reconstructions")
    print(f"prompted object found: {one['found']:.1%} of {one['images']} one-object images")
    print(f"head mIoU, one object: seen {one['miou_seen']:.1%}, unseen {one['miou_unseen']:.1%}")
    print(f"ceiling of the latent grid: {one['latent_grid_ceiling']:.1%}")
    print(f"area of an absent query's mask: {one['absent_query_area']:.1%} of the image")
    groups = ", ".join(f"{g} {two[g]['miou']:.1%} ({two[g]['images']})" for g in ("seen", "mixed", "unseen"))
    print(f"head mIoU, two objects: {groups}; both found {two['both_found']:.1%}, swapped {two['swap_rate']:.1%}")
    return result
