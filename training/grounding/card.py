"""The card of a trained head: data, detector, cost, quality, and a picture of each name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grounded_diffusion.training.grounding.config import HeadTraining
from grounded_diffusion.training.grounding.store import ExampleSet
from grounded_diffusion.training.head.head import HeadConfig

PICTURE = "grounding.webp"
MEASURED = "grounding.json"
TILE = 128  # pixels of a picture, where it is larger
COLUMNS = 4  # names to a row

CARD = """# {title}

A grounding head on {model}, trained by `gd-train head`. `gd-export --ckpt` takes this folder as it is.

![for each name an image, the detector's mask of it and the head's]({picture})

From left to right, for each of {pictured}: the image, what the detector found, what the head found.

| what | value |
|---|---|
| examples | {examples} |
| masks from | {detectors} |
| seen names | {seen} |
| unseen names | {unseen} |
| settings | {settings} |
| head | {parameters:.1f} M parameters, {variant} form, read at timestep {timestep} |
| cost | {steps:,} steps of {batch} examples, {minutes:.1f} minutes on {device} |

## Measured

Against the detector, objects that it did not find left out; intersections over unions pooled by name. The head with
the best mIoU on seen names was kept{best}.

| names | mIoU |
|---|---|
| seen | {miou_seen} |
| unseen | {miou_unseen} |
{by_name}
## Examples by name

| name | images | found | not found |
|---|---|---|---|
{yields}
"""


def percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}%"


def describe_detector(about: Mapping[str, Any]) -> str:
    """One line about what made the masks."""
    if "annotations" in about:
        return f"the annotations of {about['annotations']}"
    return (
        f"{about['detector']} (weights {about['weights'][:12]}), score at least {about['score']}, instances: "
        f"{about['instances']}"
    )


def write_card(
    out: Path,
    *,
    model: str,
    sets: Sequence[ExampleSet],
    config: HeadTraining,
    names: Mapping[str, Sequence[str]],
    parameters: int,
    head: HeadConfig,
    timestep: int,
    seconds: float,
    device: str,
    best: Mapping[str, Any],
    pictured: Sequence[str],
    yields: Mapping[str, Mapping[str, int]],
) -> None:
    """Write README.md and grounding.json into a checkpoint directory."""
    by_name = best.get("by_name", {})
    settings = {key: value for key, value in asdict(config).items() if key not in ("iterations", "head")}
    content = dict(
        model=model, settings=asdict(config), seconds=round(seconds, 1), device=device, validation=dict(best),
        examples=[dict(folder=one.folder.name, count=len(one), source=one.about.source, detectors=one.detectors)
                  for one in sets],
        yields=dict(yields), names={key: list(value) for key, value in names.items()},
    )  # fmt: skip
    (out / MEASURED).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = CARD.format(
        title=out.name,
        model=model,
        picture=PICTURE,
        pictured=", ".join(pictured),
        examples="; ".join(f"{len(one):,} of {one.folder.name} ({source_line(one.about.source)})" for one in sets),
        detectors="; ".join(dict.fromkeys(describe_detector(about) for one in sets for about in one.detectors)),
        seen=", ".join(names["seen"]),
        unseen=", ".join(names["unseen"]) or "none named",
        settings=", ".join(f"{key} {value}" for key, value in settings.items()),
        parameters=parameters / 1e6,
        variant=head.variant,
        timestep=timestep,
        steps=config.iterations,
        batch=config.batch,
        minutes=seconds / 60,
        device=device,
        best=f", of step {best['step']:,}" if best else "; none was measured, so it is the last one",
        miou_seen=percent(best.get("miou_seen")),
        miou_unseen=percent(best.get("miou_unseen")),
        by_name="".join(f"| {name} | {percent(value)} |\n" for name, value in sorted(by_name.items())),
        yields="\n".join(f"| {name} | {c['images']} | {c['found']} | {c['zero']} |" for name, c in yields.items()),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def source_line(source: Mapping[str, Any]) -> str:
    """Where examples come from, in a few words."""
    shown = {key: value for key, value in source.items() if isinstance(value, str | int | float)}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def picture(tiles: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], file: Path) -> None:
    """A sheet of (image uint8 [H,W,3], detector's mask, head's mask), outside of masks dimmed."""
    cells = []
    for image, truth, predicted in tiles:
        dimmed = [np.where(mask[..., None], image, image // 4) for mask in (truth, predicted)]
        cell = Image.fromarray(np.concatenate([image, *dimmed], 1).astype(np.uint8))
        if image.shape[0] > TILE:
            cell = cell.resize((3 * TILE * image.shape[1] // image.shape[0], TILE))
        cells.append(cell)
    if not cells:
        return
    width, height, gap = cells[0].width, cells[0].height, 4
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for k, cell in enumerate(cells):
        sheet.paste(cell, (k % columns * (width + gap), k // columns * (height + gap)))
    sheet.save(file, quality=90)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
