"""The command behind gd-train head: examples in, a checkpoint with its card out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grounded_diffusion.engine.dataset.shards import finished_shards
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import readable_errors
from grounded_diffusion.training.checkpoint import save_checkpoint
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import Pool
from grounded_diffusion.training.grounding.card import PICTURE, count_parameters, picture, write_card
from grounded_diffusion.training.grounding.config import HeadTraining
from grounded_diffusion.training.grounding.presence import fit_presence
from grounded_diffusion.training.grounding.store import Example, ExampleSet, yields
from grounded_diffusion.training.grounding.train import HeadTrainer
from grounded_diffusion.training.grounding.validate import Validation

CALIBRATION = 2048  # examples that presence is calibrated on, at most
WORK = "training"  # folder of a checkpoint with the state of its training


@dataclass(frozen=True, slots=True)
class HeadJob:
    """What to train on, and where to.

    Attributes:
        base: a Stable Diffusion model: a diffusers-format directory, or a hub name.
        examples: folders of gd-train examples or gd-train real.
        out: the checkpoint directory to write.
        config: settings.
        validation: folders of examples to measure on, such as of unseen names; none of them is trained on.
        device: "cpu" or "cuda"; None takes a GPU where there is one.
        tensorboard: also write curves for TensorBoard.
        presence: also calibrate a score of whether an object is there at all.
    """

    base: str
    examples: Sequence[Path]
    out: Path
    config: HeadTraining
    validation: Sequence[Path] = ()
    device: str | None = None
    tensorboard: bool = False
    presence: bool = False


def train_head(job: HeadJob, say: Callable[[str], None]) -> None:
    """Train a head and write `job.out`; the same call goes on where it was stopped.

    Raises:
        UsageError: examples of another model than `job.base`, of other sizes, or damaged.
        CheckpointError: the base is of another family, or lacks tensors.
    """
    from accelerate import Accelerator

    check_out(job.out)
    if job.device and job.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(
            f"there is no GPU that torch can use for --device {job.device}; leave it out to train on the CPU"
        )
    accelerator = Accelerator(cpu=job.device == "cpu")
    quiet = say if accelerator.is_main_process else lambda line: None
    sets, held = [ExampleSet(folder) for folder in job.examples], [ExampleSet(folder) for folder in job.validation]
    about = sets[0].about
    quiet(f"loading {job.base}")
    base = FrozenBase(job.base, accelerator.device, about.query_template)
    check_model(base, [*sets, *held])
    pool, validation, seen = Pool(sets), [], {name for one in sets for name in one.about.seen}
    rest, kept = hold_back(len(pool), job.config)
    validation = [pool[k] for k in kept] + [e for one in held for e in spread(one, job.config.validation)]
    pool.places = [pool.places[k] for k in rest]
    measure = Validation(base, validation, sorted(seen)) if validation else None
    with curves(job, accelerator) as log:
        trainer = HeadTrainer(base, pool, job.config, job.out / WORK, measure, accelerator, quiet, log)
        head = trainer.run()
    if accelerator.is_main_process:
        names = {"seen": sorted(seen), "unseen": sorted({n for one in (*sets, *held) for n in one.about.unseen} - seen)}
        presence = None
        if job.presence:
            presence, told = fit_presence(base, head.to(base.device), spread(pool, CALIBRATION), sorted(seen))
            presence.to("cpu")
            quiet(f"presence: {told.line()}")
        with readable_errors(job.out):
            head = head.to("cpu")
            checkpoint = base.with_head(head, capture_timestep=about.capture_timestep, names=names)
            for part in ("unet", "vae", "text_encoder"):
                base.parts[part].to("cpu")
            base.device, base._empty = torch.device("cpu"), base._empty.cpu()
            save_checkpoint(job.out, replace(checkpoint, presence=presence))
            pictured = write_picture(job.out, base, head, [*sets, *held], sorted(seen))
            write_card(
                job.out,
                model=Path(job.base).name,
                sets=sets,
                config=job.config,
                names=names,
                head=head.config,
                parameters=count_parameters(head),
                timestep=about.capture_timestep,
                seconds=trainer.seconds,
                device=device_name(accelerator),
                best=trainer.best,
                pictured=pictured,
                yields=all_yields(sets),
            )
        quiet(f"wrote {job.out}; gd-export --ckpt {job.out} makes a bundle of it")
    accelerator.wait_for_everyone()


def check_out(out: Path) -> None:
    """Raise UsageError where `out` is not empty and not a training of ours."""
    if out.is_file():
        raise UsageError(f"{out} is a file; give --out a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        raise UsageError(f"{out} is not empty and was not written by gd-train head; choose another --out")


def check_model(base: FrozenBase, sets: Sequence[ExampleSet]) -> None:
    """Raise UsageError for examples that another model has made."""
    for one in sets:
        if one.about.base != base.digest:
            raise UsageError(
                f"{one.folder} was made by another model (weights {one.about.base[:12]}) than {base.source} "
                f"({base.digest[:12]}); give its own --base, or make examples with a bundle of this one"
            )


def hold_back(count: int, config: HeadTraining) -> tuple[list[int], list[int]]:
    """(to train on, to validate on): every n-th example, at most a tenth of all."""
    wanted = min(config.validation if config.validate_every else 0, count // 10)
    kept = {round((k + 0.5) * count / wanted) for k in range(wanted)} if wanted else set()
    return [k for k in range(count) if k not in kept], sorted(k for k in kept if k < count)


def spread(examples: ExampleSet | Pool, most: int) -> list[Example]:
    """At most so many examples, evenly over the set."""
    count = min(most, len(examples))
    return [examples[k * len(examples) // count] for k in range(count)]


class curves:  # noqa: N801 - used as a function
    """TensorBoard curves of a run, if they are wanted. Raises UsageError where TensorBoard is not installed."""

    def __init__(self, job: HeadJob, accelerator: Any):
        self.writer = None
        if job.tensorboard and accelerator.is_main_process:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard needs the package tensorboard; pip install tensorboard") from None
            self.writer = SummaryWriter(job.out / WORK / "tensorboard")

    def __enter__(self):
        return self._log

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def _log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)


def write_picture(out: Path, base: FrozenBase, head, sets: Sequence[ExampleSet], seen: Sequence[str]) -> list[str]:
    """One picture a name that the detector has found somewhere; returns the names, the seen ones first."""
    places: dict[str, tuple[ExampleSet, int, int]] = {}
    for one in sets:
        for k in range(len(one)):
            for o, (name, area) in enumerate(zip(one.names(k), one.areas(k), strict=True)):
                if area and name not in places:
                    places[name] = (one, k, o)
    names = sorted(places, key=lambda name: (name not in seen, name))
    tiles = []
    with head.taps(base.unet) as taps:
        for one, k, o in (places[name] for name in names):
            example, judge = one[k], Validation(base, [one[k]], seen)
            predicted = judge.predict(head, taps, [example])[0, o].numpy()
            tiles.append((one.image(k), example.masks[o], predicted))
    picture(tiles, out / PICTURE)
    return names


def all_yields(sets: Sequence[ExampleSet]) -> dict[str, dict[str, int]]:
    """What came of each name, over all folders."""
    total: dict[str, dict[str, int]] = {}
    for one in sets:
        storage = open_storage(str(one.folder))
        for name, counts in yields(storage, finished_shards(storage)).items():
            into = total.setdefault(name, dict.fromkeys(counts, 0))
            for key, value in counts.items():
                into[key] += value
    return dict(sorted(total.items()))


def device_name(accelerator: Any) -> str:
    """What it ran on, for the card."""
    kind = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    return kind if accelerator.num_processes == 1 else f"{accelerator.num_processes} x {kind}"
