"""docs/results.md: every figure of truth.json in tables beside the paper's own, with charts and pages of pictures."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import replace_file
from grounded_diffusion.training.evaluation.lab import FIGURES, Figures, read_figures
from grounded_diffusion.training.evaluation.paper import ABLATIONS, COLUMNS_2, PAPER
from grounded_diffusion.training.evaluation.report.charts import bars, curves
from grounded_diffusion.training.evaluation.tally import GROUPS

TITLES = {
    "pascal": "PASCAL's names",
    "coco": "COCO's names",
    "things": "All names of the shipped model",
    "own": "Names",
}
METHODS = {
    "": "trained head",
    "presence.": "the same, absent names left out",
    "paper_form.": "the same in the paper's form",
    "attention.": "attention head, untrained",
    "daam.": "DAAM at 0.4",
    "daam_best.": "DAAM at its best threshold",
    "second.": "the second detector, which knows all names",
}
COLUMNS = ("one seen", "one unseen", "two seen", "mixed", "two unseen")
TARGETS = dict(zip(GROUPS, (92, 88, 88, 80, 70), strict=True))  # of VOC's splits, on either track
HEAD = """# Results

How well masks fit, on images the model makes and on images whose masks are known: the paper's tables, made anew by
`gd-eval` on the model that ships. It draws renders of 60 kinds of thing at 64x64 pixels, so the paper's figures (in
brackets), which are Stable Diffusion's, say how the method behaves there, and are no competitor's. Everything is mIoU
in per cent, pooled by name; `make results` writes this page from
[bench/results/truth.json](../bench/results/truth.json).

- **Oracle track**: images of the model; true is what the detector finds. An image counts where it finds everything
  that was asked for.
- **Exact track**: rendered scenes whose masks are known, read in the first step of their inversion (the paper's C.3).
- **The second detector** sees the image that the same latents decode to, so it tells what can be known of a mask there:
  on the oracle track how well two detectors agree, on the exact track what the autoencoder leaves.
- **DAAM** reads the attention of the whole generation, so it has no exact track. Its best threshold is that of the seen
  names.
"""


TITLE = HEAD.partition("\n")[0].encode()


def cell(figures: Figures, name: str) -> str:
    """A figure with the paper's in brackets; a dash where it was not measured."""
    own = f"{figures[name]:.1f}" if name in figures else "–"
    return f"{own} ({PAPER[name]:.1f})" if name in PAPER and figures is not PAPER else own


def group_rows(figures: Figures, rows: Iterable[tuple[str, str]], track: str, first: str) -> list[str]:
    """A table of (title, place) rows over GROUPS; a row of which nothing was measured is left out."""
    lines = [f"| {first} | {' | '.join(COLUMNS)} |", f"|---{'|--:' * len(COLUMNS)}|"]
    for title, place in rows:
        names = [f"{place}.{track}.{group}" for group in GROUPS]
        if any(name in figures for name in names):
            lines.append(f"| {title} | {' | '.join(cell(figures, name) for name in names)} |")
    return lines if len(lines) > 2 else []


def splits_of(figures: Figures, vocabulary: str) -> list[str]:
    found = {name.split(".")[1] for name in figures if name.startswith(f"{vocabulary}.split")}
    return sorted(found)


def vocabulary_section(figures: Figures, name: str) -> list[str]:
    """Table 1 for one vocabulary, both tracks, and what is known of the images."""
    lines, splits = [f"## {TITLES.get(name, name)} (Table 1)", "", *about(figures, name)], splits_of(figures, name)
    for track in ("oracle", "exact"):
        rows = [(title, f"{prefix}{name}") for prefix, title in METHODS.items()]
        if len(splits) > 1:
            rows[1:1] = [(f"trained head, {split}", f"{name}.{split}") for split in splits]
        if table := group_rows(figures, rows, track, f"{track} track"):
            lines += [*table, ""]
    return lines + shortcomings(figures, name) + by_name(figures, name)


def shortcomings(figures: Figures, name: str) -> list[str]:
    """What one mIoU hides: exchanged masks, masks of absent names, images that did not count, the grid's ceiling."""
    columns = {
        "found": "found, one object", "both_found": "both found", "found_least": "worst name found",
        "accepted": "images that count", "ceiling": "ceiling of the latents' grid", "swap_rate": "masks exchanged",
        "absent_area": "area of an absent name",
    }  # fmt: skip
    tracks = [t for t in ("oracle", "exact") if any(f"{name}.{t}.{key}" in figures for key in columns)]
    lines = ["| beside | " + " | ".join(f"{t} track" for t in tracks) + " |", f"|---{'|--:' * len(tracks)}|"]
    for key, title in columns.items():
        if any(f"{name}.{track}.{key}" in figures for track in tracks):
            lines.append(f"| {title} | {' | '.join(cell(figures, f'{name}.{track}.{key}') for track in tracks)} |")
    told = [f"presence.{name}.{track}.absent_area" for track in tracks]
    if any(place in figures for place in told):
        lines.append(
            f"| the same, without what presence says is absent | {' | '.join(cell(figures, p) for p in told)} |"
        )
    return [*lines, ""] if len(lines) > 2 else []


def by_name(figures: Figures, name: str) -> list[str]:
    lines = [f"![IoU by name](results/{name}-names.svg)", ""] if names_of(figures, name) else []
    for track in ("oracle", "exact"):
        if f"about.{name}.page.{track}" in figures:
            lines += [
                f"The best, the middling and the worst images of each group on the {track} track, by IoU; from above: "
                "the image, the head's masks, the true ones.", "",
                f"![best, middling and worst](results/{name}-{track}.webp)", "",
            ]  # fmt: skip
    return lines


def names_of(figures: Figures, name: str) -> dict[str, float]:
    """IoU by name on the first split's oracle track, the best first."""
    start = f"{name}.split1.oracle.name."
    found = {key.removeprefix(start): value for key, value in figures.items() if key.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def about(figures: Figures, name: str) -> list[str]:
    """What was run, in the words of the run itself, and remarks that somebody has added to the figures."""
    told = [figures[key] for key in (f"about.{name}", f"note.{name}") if key in figures]
    return [line for text in told for line in (text, "")]


def protocol2_section(figures: Figures) -> list[str]:
    """Table 2."""
    rows = {f"protocol2.{kind}": f"trained head, {kind}" for kind in ("one", "two", "mixture")} | {
        "protocol2.exact.mixture": "exact masks of rendered or annotated images: the bound",
        "protocol2.judge.mixture": "the judge's masks",
        "protocol2.presence.mixture": "trained head, absent names left out",
        "protocol2.paper_form.mixture": "trained head in the paper's form",
        "protocol2.attention.mixture": "attention head, untrained",
        "protocol2.daam.mixture": "DAAM at its best threshold",
    }
    columns = (*COLUMNS_2, "with_background")
    shown = [
        f"| {title} | {' | '.join(cell(figures, f'{place}.{column}') for column in columns)} |"
        for place, title in rows.items()
        if f"{place}.seen" in figures
    ]
    if not shown:
        return []
    lines = ["## A network trained on generated images (Table 2)", "", *about(figures, "protocol2")]
    return [
        *lines,
        "| trained on masks of | seen | unseen | harmonic | all and background |",
        "|---|--:|--:|--:|--:|",
        *shown,
        "",
    ]


def ablation_section(figures: Figures, name: str) -> list[str]:
    """One ablation, its rows in the order in which they were measured, the paper's own below."""
    start = f"ablation.{name}."
    labels = labels_of(figures, start)
    lines = [f"### {ABLATIONS[name]}", "", *about(figures, f"ablation.{name}")]
    for track in ("oracle", "exact"):
        rows = [(label, f"{start}{label}") for label in labels]
        if table := group_rows(figures, rows, track, f"{track} track"):
            lines += [*table, ""]
    theirs = [label for label in labels_of(PAPER, start) if label not in labels]
    if theirs and labels:
        rows = [(f"the paper's {label}", f"{start}{label}") for label in theirs]
        lines += [*group_rows(PAPER, rows, "oracle", "the paper"), ""]
    if name == "timestep" and labels:
        lines += ["![mIoU by timestep](results/timestep.svg)", ""]
    return lines


def labels_of(figures: Figures, start: str) -> list[str]:
    """Labels below a place, those with a number by it."""
    found = dict.fromkeys(key.removeprefix(start).split(".")[0] for key in figures if key.startswith(start))
    digits = lambda label: "".join(re.findall("[0-9]", label)).lstrip("0")
    return sorted(found, key=lambda label: (len(digits(label)), digits(label)))


def targets(figures: Figures) -> list[str]:
    """What was aimed at on VOC's splits, and what was reached."""
    place = "pascal"
    tracks = [track for track in ("oracle", "exact") if f"{place}.{track}.one_seen" in figures]
    if not tracks:
        return []
    lines = ["## What was aimed at", "", f"| group | aim | {' | '.join(tracks)} |", f"|---|--:{'|--:' * len(tracks)}|"]
    for group, title in zip(GROUPS, COLUMNS, strict=True):
        reached = [figures.get(f"{place}.{track}.{group}") for track in tracks]
        shown = ["–" if v is None else f"{v:.1f}{'' if v >= TARGETS[group] else ', missed'}" for v in reached]
        lines.append(f"| {title} | {TARGETS[group]} | {' | '.join(shown)} |")
    return [*lines, ""]


def limits(figures: Figures) -> list[str]:
    """What does not work, and what was tried in vain: a remark of the figures."""
    told = about(figures, "limits")
    return ["## What does not work", "", *told] if told else []


def page(figures: Figures) -> str:
    """The whole page."""
    lines = [HEAD]
    for name in TITLES:
        if splits_of(figures, name):
            lines += vocabulary_section(figures, name)
    lines += [*targets(figures), *protocol2_section(figures)]
    measured = [name for name in ABLATIONS if labels_of(figures, f"ablation.{name}.")]
    if measured:
        lines += ["## Ablations", ""]
    for name in measured:
        lines += ablation_section(figures, name)
    lines += limits(figures)
    return "\n".join(lines).rstrip("\n") + "\n"


def write_charts(figures: Figures, folder: Path) -> None:
    """The charts that the page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TITLES:
        if values := names_of(figures, name):
            unseen = str(figures.get(f"about.{name}.unseen", "")).split(", ")
            replace_file(folder / f"{name}-names.svg", bars(values, unseen).encode())
    start = "ablation.timestep."
    if labels := [label for label in labels_of(figures, start) if re.fullmatch("t[0-9]{1,4}", label)]:
        lines = {}
        for group, title in zip(GROUPS, COLUMNS, strict=True):
            points = [(int(label[1:]), figures.get(f"{start}{label}.oracle.{group}")) for label in labels]
            if known := [(x, y) for x, y in points if y is not None]:
                lines[title] = known
        replace_file(folder / "timestep.svg", curves(lines, "timestep of training at which the head reads").encode())


def write_report(runs: Sequence[Path], truth: Path, out: Path) -> Figures:
    """Add the figures and pages of runs to `truth`, and write the page `out` with its pictures beside it.

    Raises:
        UsageError: a run without figures, nothing measured at all, something else than such a page at `out`, or a
            run's own file as `truth`.
    """
    with contextlib.suppress(FileNotFoundError), out.open("rb") as stream:
        if stream.read(len(TITLE)) != TITLE:
            raise UsageError(f"{out} is there and no page of gd-eval's, so it is not replaced; give another --out")
    if runs and truth.name == FIGURES:
        raise UsageError(f"{truth} is what a run has measured, so nothing is added to it; give another --truth")
    figures, folder = read_figures(truth), out.parent / out.stem
    for run in runs:
        found = read_figures(run / FIGURES)
        if not found:
            raise UsageError(f"{run} has no figures; give a folder that gd-eval protocol1, protocol2 or ablation wrote")
        for page_file in sorted((run / "pages").glob("*.webp")):
            name, _, track = page_file.stem.rpartition("-")
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page_file, folder / page_file.name)
            found[f"about.{name}.page.{track}"] = page_file.name
        figures |= found
    if not figures:
        raise UsageError(f"{truth} has no figures yet; give the folders of runs")
    if runs:
        truth.parent.mkdir(parents=True, exist_ok=True)
        replace_file(truth, json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    write_charts(figures, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page(figures).encode())
    return figures
