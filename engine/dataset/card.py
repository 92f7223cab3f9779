"""A data set card: README.md with the YAML that the Hugging Face hub reads, recipe, classes, licence notes, and a sheet
of samples. Needs the shards' records only, so it works for every format; the sheet needs the format "folder"."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from grounded_diffusion.bundle import MANIFEST, SHIPPED, read_manifest, sha256
from grounded_diffusion.cache import cache_folder
from grounded_diffusion.engine.dataset.formats.tables import yaml_string
from grounded_diffusion.engine.dataset.rows import FolderRow, Row
from grounded_diffusion.engine.dataset.runfile import INFER, read_about, read_summary
from grounded_diffusion.engine.dataset.shards import Recording, Rows, finished_shards, note_files
from grounded_diffusion.engine.dataset.sheet import choose, draw_sheet
from grounded_diffusion.engine.dataset.storage.base import FINISHED, Storage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.prompts.vocabulary import THINGS_NAMES
from grounded_diffusion.errors import UsageError

CARD, SHEET = "README.md", "card.png"
SIGN = "grounded-diffusion"  # in every card that is ours
SHOWN = 200  # classes
# The hub's size categories: fewer than so many samples.
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"),
         (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))  # fmt: skip
RECIPE = ("sampler", "steps", "guidance_scale", "guidance_interval", "negative_prompt", "seed", "images_per_prompt",
          "batch", "threshold", "attempts", "require_masks", "min_area", "max_area", "min_score", "max_overlap",
          "min_distance", "min_presence", "jpeg_quality", "void_border", "void_band")  # fmt: skip
LOAD = {
    "folder": """\
from grounded_diffusion.engine.dataset.reader import FolderDataset

for record in FolderDataset("."):  # the folder of this file
    record.image, record.labels, {thing.name: thing.mask for thing in record.objects}""",
    "hf-imagefolder": 'from datasets import load_dataset\n\ndata = load_dataset(".")  # the folder of this file',
    "hf-parquet": 'from datasets import load_dataset\n\ndata = load_dataset(".")  # the folder of this file',
    "coco": """\
from pycocotools.coco import COCO

coco = COCO("annotations/instances_train.json")  # images are under images/""",
    "webdataset": """\
import glob
import webdataset

data = webdataset.WebDataset(sorted(glob.glob("*.tar")), shardshuffle=False).decode("pil")""",
}


@dataclass(slots=True)
class Counts:
    """What a card tells of a class; `label` is its id in formats that have ids."""

    label: int
    images: int = 0
    empty: int = 0
    area: float = 0.0
    score: float = 0.0


@dataclass(slots=True)
class Contents:
    """What a card tells of the samples."""

    images: int = 0
    sizes: set[tuple[int, int]] = field(default_factory=set)
    classes: dict[str, Counts] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        self.images += 1
        self.sizes.add((row["width"], row["height"]))
        for thing in row["objects"]:
            counts = self.classes.setdefault(thing["name"], Counts(thing["label"]))
            counts.images += 1
            counts.empty += not thing["area"]
            counts.area += thing["area"] / (row["width"] * row["height"])
            counts.score += thing["score"] if thing["area"] else 0.0


def write_card(
    path: str,
    *,
    title: str | None = None,
    license: str | None = None,
    model: Path | None = None,
    overwrite: bool = False,
) -> Contents:
    """Write the card of a finished data set, and its sheet in the format "folder".

    Args:
        path: folder or URL of what gd-infer, gd-dataset convert or gd-dataset merge wrote.
        title: None takes the folder's name.
        license: for the YAML, in the hub's spelling, as in "cc-by-4.0"; the choice is the user's.
        model: the bundle; None looks for the shipped model's.
        overwrite: replace a README.md that is not ours.

    Raises:
        UsageError: not a finished data set, a file that cannot be read, or another README.md.
    """
    recording = Recording(open_storage(path))
    storage = cast(Storage, recording)
    about = read_about(storage)
    if not about or not storage.exists(FINISHED):
        raise UsageError(f"{path} is no finished data set; gd-dataset status {path} tells what is missing")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UsageError(f"license takes the hub's spelling, as in cc-by-4.0, not {license!r}", "license")
    old = storage.read(CARD).decode(errors="replace") if storage.exists(CARD) else ""
    if old and SIGN not in old and not overwrite:
        line = f"{storage.root}/{CARD} was not written by grounded-diffusion; `overwrite` replaces it"
        raise UsageError(line, "overwrite")
    rows, contents = Rows(storage, finished_shards(storage), FolderRow if about.format == "folder" else Row), Contents()
    for row in rows:
        contents.add(row)
    if about.format == "folder":
        storage.put(SHEET, draw_sheet(storage, choose(rows)))
    title = title or Path(storage.root).resolve().name
    settings = about.settings if about.made_by == INFER else {}
    parts = [
        front_matter(title, license, contents.images, columns_of(old)),
        introduction(title, contents, about.format),
        recipe(settings, read_summary(storage) or {}),
        classes_table(contents, about.format),
        loading(about.format),
        licence_notes(settings.get("model"), model),
    ]
    storage.put(CARD, "\n".join(filter(None, parts)).encode())
    note_files(recording)
    storage.clean()
    return contents


def columns_of(card: str) -> str:
    """`configs` and `dataset_info` of a card that a Hugging Face format wrote; they come last in its YAML."""
    found = re.match(r"---\n.*?^(configs:\n.*?)^---\n", card, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def front_matter(title: str, license: str | None, images: int, columns: str) -> str:
    """The YAML between two lines of dashes."""
    size = next((name for below, name in SIZES if images < below), "n>1T")
    lines = ["---", f"pretty_name: {yaml_string(title)}"]
    lines += [f"license: {yaml_string(license)}"] if license else []
    lines += ["task_categories:", "- image-segmentation", "- object-detection", "annotations_creators:",
              "- machine-generated", "size_categories:", f"- {size}", "tags:", "- synthetic", f"- {SIGN}"]  # fmt: skip
    return "\n".join(lines) + "\n" + columns + "---\n"


def introduction(title: str, contents: Contents, format: str) -> str:
    """Title, counts and pictures."""
    sizes = [f"{width}x{height}" for width, height in sorted(contents.sizes)[:3]] + ["..."] * (len(contents.sizes) > 3)
    masks = sum(counts.images - counts.empty for counts in contents.classes.values())
    text = (
        f"# {title}\n\n{contents.images:,} images of {', '.join(sizes) or 'no'} pixels with {masks:,} masks of "
        f"{len(contents.classes):,} classes, generated from text by {SIGN}. One mask covers all of a kind; nobody has "
        "drawn or checked them.\n"
    )
    return text + (f"\n![Samples, each beside its masks]({SHEET})\n" if format == "folder" else "")


def recipe(settings: dict[str, Any], summary: dict[str, Any]) -> str:
    """How the data set was made, as far as the run tells."""
    if "model" not in settings:
        return ""
    rows = [
        ("model (SHA-256 of its manifest)", f"`{settings['model']}`"),
        ("prompts (SHA-256)", f"`{settings['prompts']}`"),
    ]
    rows += [(key.replace("_", " "), settings[key]) for key in RECIPE if told(settings.get(key))]
    lines = ["## Recipe\n", "| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)]
    if summary:
        lost = "; ".join(f"{reason}: {n}" for reason, n in summary["reasons"].items())
        lines.append(f"| samples | {summary['accepted']:,} of {summary['samples']:,} accepted{lost and f' ({lost})'} |")
    lines.append(
        "\nThe same prompts, model and settings give the same samples: a record's `seed` and `draw` say which noise "
        "its image was drawn from."
    )
    return "\n".join(lines) + "\n"


def told(value: Any) -> bool:
    """Whether a setting is worth a line."""
    return value is not None and value is not False


def classes_table(contents: Contents, format: str) -> str:
    """A line a class."""
    ids = format != "folder"  # there, labels count the objects of a sample
    most = sorted(
        contents.classes.items(), key=lambda item: (item[1].label, item[0]) if ids else (-item[1].images, item[0])
    )
    lines = ["## Classes\n", f"| {'id | ' * ids}class | images | without a mask | mean area | mean score |",
             f"| {'--- | ' * ids}--- | --: | --: | --: | --: |"]  # fmt: skip
    for name, counts in most[:SHOWN]:
        masks = max(1, counts.images - counts.empty)
        head = f"| {counts.label} " * ids + "| " + name.replace("|", "\\|")
        lines.append(
            f"{head} | {counts.images:,} | {counts.empty:,} | {counts.area / masks:.1%} | {counts.score / masks:.3f} |"
        )
    if len(most) > SHOWN:
        lines.append(f"\nand {len(most) - SHOWN:,} more.")
    return "\n".join(lines) + "\n\nThe score is the model's mean probability inside a mask; it is not an accuracy.\n"


def loading(format: str) -> str:
    """How to read the data set."""
    text = f"## Loading\n\nThe format is `{format}`.\n"
    if format in LOAD:
        text += f"\n```python\n{LOAD[format]}\n```\n"
    if format == "folder":
        text += (
            "\n`gd-dataset convert . --format hf-parquet --out DIR` writes it for `datasets.load_dataset`, and so on "
        )
        text += "for COCO, VOC, WebDataset, YOLO and others.\n"
    return text


def licence_notes(digest: str | None, bundle: Path | None) -> str:
    """What is known of the rights in the pictures."""
    text = (
        "## Licence notes\n\nImages and masks come out of a generative model. No photograph and no human annotation is "
        "among them. What the licences of the model and of its training data ask for may hold for its pictures too.\n"
    )
    manifests = [bundle / MANIFEST] if bundle else sorted(cache_folder().glob(f"*/{MANIFEST}"))
    for file in manifests:
        if not file.is_file() or digest != sha256(file):
            if bundle:
                line = f"{bundle} is not the model of this data set; give `model` the bundle it was made with"
                raise UsageError(line, "model")
            continue
        manifest = read_manifest(file.parent)
        names = {name for some in manifest.names.values() for name in some}
        text += f"\nThe model is of the family {manifest.family}, in {manifest.precision}.\n"
        if names and names <= set(THINGS_NAMES):
            text += (
                f"\nIt is `{SHIPPED}`, which comes with {SIGN} (Apache-2.0), or was trained like it: on pictures "
                "composed of 3D models and photographs under Creative Commons licences, CC-BY-SA-4.0 and 3.0 among "
                "them; who made them is listed in the folder training/things/bank of that package.\n"
            )
        break
    return text
