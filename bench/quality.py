"""What settings cost and what they give: images a second beside what a judge says of the images and masks.

The judge is a segmenter that knows the model's names. Of every image it is asked whether the prompted objects are
there, and where; the head's masks are compared with its own. All settings start from the same
noise and take turns batch by batch, so that both prices and qualities are compared pair by pair. The first setting is
what the others are compared with.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grounded_diffusion.bench.systems import Engine, open_peer, psnr
from grounded_diffusion.bench.timing import Timing
from grounded_diffusion.bench.work import EVERY_STEP, Output, PeerForm, System, Work
from grounded_diffusion.engine import GroundedPipeline, Options, Prompt
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.network import BACKGROUND
from grounded_diffusion.training.detectors.segmenters import TransformersSegmenter
from grounded_diffusion.training.metrics import PooledIoU

SEED = 41
LEAST_AREA = 0.02  # share of the image that a found object covers
LEAST_SHARE = 0.5  # share of what the judge sees at all that carries the prompted name
SYSTEMS, PRECISIONS, MODELS = ("engine", "eager", "compile"), ("fp32", "bf16", "int8"), ("given", "student")
Pipes = Mapping[tuple[str, str], GroundedPipeline]  # by model and precision
OPTIONS = tuple(field.name for field in fields(Options))
ALWAYS = {"guidance_interval": EVERY_STEP}
RECIPE = {"name": "released recipe", "system": "eager", "sampler": "ddim", "steps": 50} | ALWAYS
BF16, INT8 = {"precision": "bf16"}, {"precision": "int8"}
DEFAULT = (  # the recipe in diffusers, the same in the engine, and what is faster
    RECIPE,
    RECIPE | BF16 | {"name": "released recipe, bf16"},
    {"name": "the same, engine", "sampler": "ddim", "steps": 50} | ALWAYS,
    {"name": "ddim, 25 steps", "sampler": "ddim", "steps": 25} | ALWAYS,
    {"name": "the default"},
    {"name": "the default, bf16"} | BF16,
    {"name": "20 steps of it, bf16", "steps": 20} | BF16,
    {"name": "the default, int8"} | INT8,
    {"name": "the student, bf16", "model": "student"} | BF16,
    {"name": "the student, int8", "model": "student"} | INT8,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run.

    Attributes:
        name: for the table.
        system: one of SYSTEMS.
        options: of the run.
        capture: training timestep at which the head reads; None for the model's own.
        precision: one of PRECISIONS; peers have no "int8".
        model: one of MODELS; "student" is the shipped model's, with its own defaults.
    """

    name: str
    system: str
    options: Options
    capture: int | None = None
    precision: str = "fp32"
    model: str = "given"


def parse_setting(text: str) -> dict[str, Any]:
    """ "sampler=dpmpp-2m steps=20 guidance_interval=[0,0.8] capture=21 name=fast" -> a dict. Raises UsageError."""
    result = {}
    for part in text.split():
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"setting {text!r}: {part!r} is not of the form key=value")
        try:
            result[key] = json.loads(value)
        except ValueError:
            result[key] = value
    return result


def make_setting(given: Mapping[str, Any], batch: int) -> Setting:
    """A setting of a dict whose keys are Options' fields and Setting's. Raises UsageError."""
    own = {"name", "system", "capture", "precision", "model"}
    if unknown := sorted(given.keys() - own - set(OPTIONS)):
        raise UsageError(f"unknown key {unknown[0]} in a setting; known: {', '.join((*sorted(own), *OPTIONS))}")
    chosen = {key: value for key, value in given.items() if key not in own}
    shown = chosen | ({"capture": given["capture"]} if "capture" in given else {})
    told = " ".join(f"{k}={'-'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in shown.items())
    words = {}
    for key, known in {"system": SYSTEMS, "precision": PRECISIONS, "model": MODELS}.items():
        words[key] = given.get(key, known[0])
        if words[key] not in known:
            raise UsageError(f"there is no {key} {words[key]!r} in a setting; choose from {', '.join(known)}")
    base = {"batch": batch} | ({} if words["system"] == "engine" else ALWAYS)  # peers know no interval
    options = Options(**base | chosen)
    return Setting(str(given.get("name", told)), options=options, capture=given.get("capture"), **words)


def with_capture(pipe: GroundedPipeline, capture: int | None) -> GroundedPipeline:
    """The same pipeline, reading the features at another training timestep."""
    if capture is None:
        return pipe
    manifest = replace(pipe.bundle.manifest, capture_timestep=capture)
    return GroundedPipeline(replace(pipe.bundle, manifest=manifest), pipe.backend)


def open_setting(setting: Setting, pipes: Pipes, checkpoint: Path) -> tuple[Setting, System]:
    """A setting with the model's own options filled in, and what runs it.

    Raises UsageError for what does not exist, or not on this machine.
    """
    if (setting.model, setting.precision) not in pipes:
        what = "" if setting.model == "given" else f" of the {setting.model}"
        raise UsageError(f"cannot run {setting.name!r}: there is no engine in {setting.precision}{what} here")
    pipe = with_capture(pipes[setting.model, setting.precision], setting.capture)
    setting = replace(setting, options=setting.options.of_model(pipe.bundle.manifest))
    return setting, open_system(setting, pipe, checkpoint)


def open_system(setting: Setting, pipe: GroundedPipeline, checkpoint: Path) -> System:
    """What runs a setting whose options are all said."""
    capture = pipe.schedule(setting.options).capture_index(pipe.bundle.manifest.capture_timestep)
    if setting.system == "engine":
        return Engine(pipe, setting.options)
    form = PeerForm(setting.options.batch, channels_last=setting.precision == "fp32")
    peer = f"{setting.system} {setting.precision}"
    return open_peer(peer, checkpoint, pipe.bundle.manifest, setting.options, capture, form)


def found(foreground: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Whether the masks of objects [B,O,H,W] cover enough [B,O]; the judge sees some name in `foreground` [B,H,W]."""
    area = masks.flatten(2).float().mean(2)
    foreground = foreground.flatten(1).float().mean(1, keepdim=True)
    objects = masks.flatten(2).any(2).sum(1, keepdim=True).clamp(min=1)
    return (area >= LEAST_AREA) & (area >= LEAST_SHARE * foreground / objects)


class Tally:
    """What has been measured of one setting."""

    def __init__(self, judge: TransformersSegmenter, names: dict[int, str]):
        self.judge, self.names, self.seconds = judge, names, []
        self.columns: dict[str, list[torch.Tensor]] = {}

    def add(self, output: Output, objects: torch.Tensor, first: Output, seconds: float) -> None:
        """A batch: labels of the prompted names [B,O], and what the first setting made of it."""
        masks, before = torch.from_numpy(output.masks), torch.from_numpy(first.masks)
        classes = torch.from_numpy(self.judge.class_maps(output.images))
        truth = classes[:, None] == objects[:, :, None, None]
        made = {
            "objects": objects,
            "found": found(torch.isin(classes, torch.tensor(list(self.names))), truth),
            "masks": masks,
            "truth": truth,
            "iou": iou(masks, truth),
            "iou_first": iou(masks, before),
            "psnr_first": torch.from_numpy(psnr(output.images, first.images)),
        }
        for name, value in made.items():
            self.columns.setdefault(name, []).append(value)
        self.seconds.append(seconds)

    def result(self, seen: Sequence[str]) -> dict[str, Any]:
        """Everything in the table; `per_image` holds what pairs of settings are compared by."""
        whole = {name: torch.cat(values) for name, values in self.columns.items()}
        hit, pooled = whole["found"], PooledIoU()
        for label, mask, truth in zip(*(whole[name][hit] for name in ("objects", "masks", "truth")), strict=True):
            pooled.add(self.names[int(label)], mask, truth)
        of = lambda names: math.nan if (value := pooled.mean(names)) is None else value
        unseen = set(self.names.values()) - set(seen)
        return {
            "images": len(hit),
            "found": hit.all(1).float().mean().item(),
            "miou": of(None),
            "miou_seen": of(seen),
            "miou_unseen": of(unseen),
            "iou_per_image": whole["iou"][hit].mean().item(),
            "mask_iou_to_first": whole["iou_first"].mean().item(),
            "psnr_to_first": whole["psnr_first"].mean().item(),
            "per_image": {"found": hit.all(1).tolist(), "iou": whole["iou"].mean(1).tolist()},
            **Timing(tuple(self.seconds)).record(),
        }


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks [B,O,H,W] -> [B,O]; 1 where both are empty."""
    either = (a | b).sum((2, 3))
    return torch.where(either > 0, (a & b).sum((2, 3)) / either.clamp(min=1), 1.0)


def compare(result: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """Difference of the mean IoU on images where both settings drew the objects, and its standard error."""
    mine, other = result["per_image"], first["per_image"]
    both = [m and o for m, o in zip(mine["found"], other["found"], strict=True)]
    gaps = np.array([m - o for m, o, ok in zip(mine["iou"], other["iou"], both, strict=True) if ok])
    error = float(gaps.std(ddof=1) / math.sqrt(len(gaps))) if len(gaps) > 1 else math.nan
    return {"iou_gap": float(gaps.mean()) if len(gaps) else math.nan, "iou_gap_error": error}


def asked_names(judge: TransformersSegmenter, pipe: GroundedPipeline) -> dict[int, str]:
    """Label -> name of what the judge can find and the model is said to draw; all labels where that is not said.

    Raises UsageError where there is none.
    """
    known = {name for group in pipe.bundle.manifest.names.values() for name in group}
    names = {k: name for k, name in judge.labels.items() if (name in known if known else name != BACKGROUND)}
    if not names:
        labels = ", ".join(judge.labels.values())
        raise UsageError(f"the judge knows none of the model's names; its labels are {labels}")
    return names


def make_work(labels: dict[int, str], shape: tuple[int, ...], count: int, objects: int) -> tuple[Work, torch.Tensor]:
    """`count` images: one-object prompts go through all names in turn; others draw theirs. And the names' labels."""
    ids, names = list(labels), list(labels.values())
    rng = np.random.default_rng(SEED)
    draw = lambda i: [i % len(names)] if objects == 1 else rng.choice(len(names), objects, replace=False).tolist()
    rows = [draw(i) for i in range(count)]
    told = [tuple(names[k] for k in row) for row in rows]
    prompts = tuple(Prompt("a photograph of a " + " and a ".join(asked), asked) for asked in told)
    asked = torch.tensor([[ids[k] for k in row] for row in rows])
    return Work(prompts, batch_normal([(SEED, i) for i in range(count)], shape)), asked


def measure_quality(
    pipes: Pipes,
    checkpoint: Path,
    judge: TransformersSegmenter,
    settings: Sequence[Mapping[str, Any]],
    *,
    images: int,
    batch: int,
    turn: int,
    objects: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run every setting on the same `images` prompts and noises and judge them.

    Args:
        pipes: the engine by model and precision.
        batch: images to a call of the network, unless a setting says otherwise.
        turn: images that a setting makes before the next one's turn: as many as the engine's lanes need.

    Raises:
        UsageError: a setting that cannot be run, or fewer images than a turn has.
    """
    if images < turn:
        raise UsageError(f"{images} images are fewer than the {turn} of a turn; ask for more, or for a smaller batch")
    pipe = next(iter(pipes.values()))
    opened = [open_setting(make_setting(setting, batch), pipes, checkpoint) for setting in settings]
    chosen, systems = zip(*opened, strict=True)
    names = asked_names(judge, pipe)
    work, rows = make_work(names, pipe.latent_shape(chosen[0].options), images, objects)
    cut = lambda low, high: Work(work.prompts[low:high], work.noise[low:high])
    tallies = [Tally(judge, names) for _ in chosen]
    for system in systems:
        system.run(cut(0, turn))  # opens sessions, warms up
    for low in range(0, images, turn):
        outputs, seconds = [], []
        for system in systems:
            start = time.perf_counter()
            outputs.append(system.run(cut(low, low + turn)))
            seconds.append(time.perf_counter() - start)
        for tally, output, spent in zip(tallies, outputs, seconds, strict=True):
            tally.add(output, rows[low : low + turn], outputs[0], spent)
        report(f"{min(low + turn, images)}/{images} images: " + ", ".join(f"{s:.1f} s" for s in seconds))
    seen = pipe.bundle.manifest.names.get("seen", [])
    results = [tally.result(seen) for tally in tallies]
    for result, setting in zip(results, chosen, strict=True):
        result |= {
            "name": setting.name,
            "system": setting.system,
            "model": setting.model,
            "precision": setting.precision,
            "options": {name: getattr(setting.options, name) for name in OPTIONS},
            "capture": setting.capture,
            "images_per_s": turn / Timing(tuple(result["seconds"][: images // turn])).median,  # of whole turns
            **compare(result, results[0]),
        }
    return [{k: v for k, v in result.items() if k != "per_image"} for result in results]


def quality_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Price and quality of all settings as a Markdown table."""
    first = results[0]
    lines = [
        "| settings | images/s | times the first | found | head mIoU (seen / unseen) | IoU an image, against the first "
        "| masks' IoU with the first's |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results:
        gap = "" if row is first else f" ({100 * row['iou_gap']:+.1f} ± {100 * row['iou_gap_error']:.1f})"
        name = row["name"] if row["system"] == "engine" else f"{row['name']} ({row['system']})"
        lines.append(
            f"| {name} | {row['images_per_s']:.2f} | {row['images_per_s'] / first['images_per_s']:.2f} "
            f"| {row['found']:.1%} | {row['miou']:.1%} ({row['miou_seen']:.1%} / {row['miou_unseen']:.1%}) "
            f"| {row['iou_per_image']:.1%}{gap} | {row['mask_iou_to_first']:.1%} |"
        )
    return lines
