"""Packing a finished run into the checkpoint directory that gd-export takes, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from grounded_diffusion.training.scratch.config import TrainConfig
from grounded_diffusion.training.scratch.evaluate import load_head
from grounded_diffusion.training.scratch.head import CAPTURE_TIMESTEP, QUERY_TEMPLATE, BaseModel

# What runs without options take: fast, at a price that docs/benchmarks.md states.
SAMPLING = {"sampler": "dpmpp-2m", "steps": 8, "guidance_scale": 7.5, "guidance_interval": [0.0, 0.6]}

CARD = """# {title}

A text-to-image model with a grounding head, trained from scratch by `gd-train` with `{config}`.
It draws {count} kinds of thing at {size}x{size} pixels, as renders on blurred natural backgrounds, and masks each.
It exists so that the engine can be run, tested and measured on a real model; it is no substitute for one
trained on photographs.

![one image a name, and the same with everything outside the head's mask dimmed](evaluation.webp)

| what | value |
|---|---|
| data | rendered scenes of 3D models and animals ([licences and attribution](../../training/things/bank)) |
| names | {names} |
| kept from the head's training | {unseen} |
| parameters | UNet {unet:.1f} M, autoencoder {vae:.1f} M, text encoder {text:.1f} M, head {head:.1f} M |
| training | {cost} |
| seed | {seed} |
| weights | FP16, diffusers format; `oracle.pt` is the segmenter that judges; Apache-2.0 |

## Measured

`gd-train evaluate`, on images generated with 25 DDIM steps at guidance 5, against a segmenter trained on renders.

| what | value |
|---|---|
| autoencoder, reconstruction of held-out scenes | {psnr:.1f} dB PSNR |
| oracle on renders / on reconstructions | {oracle_renders:.1%} / {oracle_recon:.1%} mIoU |
| prompted object found by the oracle, one-object prompts | {found:.1%} of {images} images |
| head against oracle, one object, seen / unseen names | {seen:.1%} / {unseen_miou:.1%} mIoU |
| the same, mean over images | {seen_image:.1%} / {unseen_image:.1%} |
| ceiling: best bilinear logits on the latent grid | {ceiling:.1%} mean IoU |
| area of the mask of a name that is not in the prompt | {absent:.1%} of the image |
| two objects, both found | {both:.1%} of {pair_images} images |
| head, two objects: both seen / one / none | {pair_seen:.1%} / {pair_mixed:.1%} / {pair_unseen:.1%} mIoU |
| two objects: masks exchanged | {swap:.1%} |
"""


def pack(config: TrainConfig, config_file: Path, run: Path, out: Path) -> None:
    """Write the checkpoint directory `out` with FP16 weights and a model card. Needs `evaluation.json`."""
    if not (run / "evaluation.json").is_file():
        raise CheckpointError(f"{run} has no evaluation.json; measure the model first with gd-train evaluate")
    base = BaseModel(run, "cpu")
    head = load_head(base, config, run)
    names = {"seen": list(config.seen), "unseen": list(config.unseen)}
    parts = (base.unet, base.vae, base.text_encoder, base.tokenizer, base.scheduler, head)
    save_checkpoint(out, Checkpoint(*parts, CAPTURE_TIMESTEP, QUERY_TEMPLATE, names, sampling=SAMPLING))
    shutil.copyfile(run / "evaluation.webp", out / "evaluation.webp")
    shutil.copyfile(run / "evaluation.json", out / "evaluation.json")
    shutil.copyfile(run / "oracle.pt", out / "oracle.pt")  # what gd-bench quality judges by
    measured = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    (out / "README.md").write_text(card(config, config_file, base, head, measured), encoding="utf-8")


def card(config: TrainConfig, config_file: Path, base: BaseModel, head, measured: dict) -> str:
    """The model card, filled in from the configuration and the measurements."""
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    one, two, stages = measured["one"], measured["two"], config.stages
    cost = ", ".join(f"{name} {s.steps * s.batch:,} images" for name, s in stages.items())
    return CARD.format(
        title=config_file.stem,
        config=config_file.name,
        count=len(config.names),
        size=config.world.size,
        names=", ".join(config.names),
        unseen=", ".join(config.unseen),
        unet=millions(base.unet),
        vae=millions(base.vae),
        text=millions(base.text_encoder),
        head=millions(head),
        cost=cost,
        seed=", ".join(f"{name} {s.seed}" for name, s in stages.items()),
        psnr=measured["vae_psnr"],
        oracle_renders=measured["oracle"]["miou_renders"],
        oracle_recon=measured["oracle"]["miou_reconstructions"],
        found=one["found"],
        images=one["images"],
        seen=one["miou_seen"],
        unseen_miou=one["miou_unseen"],
        seen_image=one["iou_per_image_seen"],
        unseen_image=one["iou_per_image_unseen"],
        ceiling=one["latent_grid_ceiling"],
        absent=one["absent_query_area"],
        both=two["both_found"],
        pair_images=two["images"],
        pair_seen=two["seen"]["miou"],
        pair_mixed=two["mixed"]["miou"],
        pair_unseen=two["unseen"]["miou"],
        swap=two["swap_rate"],
    )
