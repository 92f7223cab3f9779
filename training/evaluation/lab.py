"""The workplace of an evaluation: one folder in which everything is made once and found again by what it is.

OUT/bundle/            the model as the engine runs it, unless one was given
OUT/images/<key>/      examples: to train heads on, and to measure on
OUT/heads/<key>/       trainings of heads, each from its state on
OUT/figures/<key>.json what was measured, by configuration
OUT/figures.json       all of it, flat, by name
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from grounded_diffusion.bundle import open_bundle, write_manifest
from grounded_diffusion.engine.pipeline.shipped import export
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import readable_errors, replace_file
from grounded_diffusion.reading import Misfit, as_type, load_json, read_file
from grounded_diffusion.training.detectors.base import Detector, Segmenter
from grounded_diffusion.training.detectors.open import open_segmenter
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.examples import ExamplesJob, make_examples
from grounded_diffusion.training.grounding.splits import Split

FIGURES = "figures.json"
Say = Callable[[str], None]
Figures = dict[str, Any]
Figure = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]  # per cents, and numbers of images


def key_of(config: Any) -> str:
    """What a configuration is found again by."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Detectors:
    """Who says what is in an image; each as detectors.open takes it.

    Attributes:
        judge: of the images that are measured on.
        second: must agree with it; None for nobody.
        labeller: of the images that heads are trained on, asked for seen names alone; None for the judge.
        score, aliases: see detectors.base.Detector.
    """

    judge: str
    second: str | None = None
    labeller: str | None = None
    score: float = 0.5
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Lab:
    """One model, its detectors and a folder.

    Args:
        base: a Stable Diffusion model: a directory, with or without a head, or a hub name.
        out: the folder.
        detectors: who judges and who labels.
        model: the base's bundle, of any head; None exports one.
        options: of all images.
        run: more fields of RunConfig: backend, threads, lanes.
        device: torch device.
        say: takes a line for the person who waits.
    """

    def __init__(
        self, base: str | Path, out: Path, detectors: Detectors, *, model: Path | None = None, options: Options,
        run: Mapping[str, Any] | None = None, device: str = "cpu", say: Say = lambda line: None,
    ):  # fmt: skip
        self.source, self.out, self.detectors, self.model = str(base), out, detectors, model
        self.options, self.run, self.device, self.say = options, dict(run or {}), device, say
        self._segmenters: dict[str, Segmenter] = {}
        with readable_errors(out):
            out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base(self) -> FrozenBase:
        self.say(f"loading {self.source}")
        return FrozenBase(self.source, self.device)

    def detector(self, source: str, names: tuple[str, ...]) -> Detector:
        """A detector that knows these names. Raises UsageError where it does not."""
        if source not in self._segmenters:
            self._segmenters[source] = open_segmenter(source, self.device)
        options = dict(score=self.detectors.score, aliases=self.detectors.aliases)
        return Detector(self._segmenters[source], names, **options)

    def bundle(self, timestep: int | None = None) -> Path:
        """The model's bundle, reading at a timestep other than its own if one is given."""
        made = self.model or self.out / "bundle"
        if self.model is None and not made.is_dir():
            self.say(f"exporting {self.source} to {made} (a minute or two)")
            export(["--base", self.source, "--head", "untrained"], made, self.say)
        return made if timestep is None else self._twin(made, timestep)

    def _twin(self, bundle: Path, timestep: int) -> Path:
        """The same bundle with another capture timestep: links to its files, and a manifest of its own."""
        twin, opened = self.out / f"bundle-t{timestep}", open_bundle(bundle, verify=False)
        if not (twin / "manifest.json").is_file():
            shutil.rmtree(twin, ignore_errors=True)
            for name in opened.manifest.files:
                (twin / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(bundle / name, twin / name)
                except OSError:  # of another disk
                    shutil.copyfile(bundle / name, twin / name)
            write_manifest(twin, replace(opened.manifest, capture_timestep=timestep))
        return twin

    def examples(
        self, split: Split, count: int, pair_share: float, *, test: bool = False, timestep: int | None = None,
        seed: int = 0,
    ) -> Path:  # fmt: skip
        """Folder of images with masks, made now where they are not there: for heads, or to measure on if `test`."""
        source = self.detectors.judge if test else self.detectors.labeller or self.detectors.judge
        names = (*split.seen, *split.unseen) if test else split.seen
        about = self.detector(source, names).about
        options = replace(self.options, seed=seed)
        config = dict(
            base=self.base.digest, split=asdict(split), count=count, pair_share=pair_share, test=test,
            timestep=timestep, options={key: value for key, value in asdict(options).items() if key != "batch"},
            detector=about,
        )  # fmt: skip
        folder = self.out / "images" / key_of(config)
        self._same_images(folder, config)
        job = ExamplesJob(
            model=self.bundle(timestep), detector=source, split=split, out=folder, examples=count, test=test,
            pair_share=pair_share, score=self.detectors.score, device=self.device, options=options, run=self.run,
            aliases=dict(self.detectors.aliases),
        )  # fmt: skip
        if not (folder / "examples.json").is_file():
            self.say(f"{count} images {'to measure on' if test else 'to train on'}, in {folder}")
            make_examples(job, self.say)
        return folder

    def _same_images(self, folder: Path, config: dict[str, Any]) -> None:
        """Begin with the images of another detector, where there are such; masks are made anew."""
        images = key_of({key: value for key, value in config.items() if key != "detector"})
        note = folder.parent / f"{folder.name}.of"  # which images these are, whoever has looked at them
        if not note.is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            for other in folder.parent.glob("*.of"):
                twin = other.with_suffix("")
                if other.read_text(encoding="utf-8") == images and (twin / "examples.json").is_file():
                    shutil.copytree(twin, folder, ignore=lambda *_: ["masks", "examples.json"])
                    break
            replace_file(note, images.encode())

    def measured(self, config: Any, measure: Callable[[], Figures]) -> Figures:
        """Figures of a configuration: those on disk, or measured now."""
        file = self.out / "figures" / f"{key_of(config)}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["figures"]
        figures = measure()
        with readable_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"config": config, "figures": figures}
            replace_file(file, json.dumps(content, indent=1, default=str).encode() + b"\n")
        return figures

    def publish(self, figures: Figures) -> None:
        """Add figures to OUT/figures.json."""
        file = self.out / FIGURES
        replace_file(file, json.dumps(read_figures(file) | figures, indent=1, sort_keys=True).encode() + b"\n")


def read_figures(file: Path) -> Figures:
    """Figures of a file, {} where there is none. Raises UsageError for a damaged one."""
    try:
        figures = as_type(load_json(content := read_file(file)), dict[str, Any])
        for name, value in figures.items():
            as_type(value, str if name.startswith(("about.", "note.")) else Figure, content, name)
        return figures
    except FileNotFoundError:
        return {}
    except Misfit as error:
        told = f"{error.at(file)}; the file is damaged: remove it, and give the commands again that wrote it"
        raise UsageError(told) from None
