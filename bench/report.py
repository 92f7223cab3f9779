"""Results as files: JSON, Markdown tables, and a bar chart in SVG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from grounded_diffusion.bench.systems import ENGINE, EXPORTED, FOLDER
from grounded_diffusion.bench.timing import Timing

BARS, ROW, LETTER = 400, 34, 8  # pixels: the longest bar, a row, a letter's width
OURS, THEIRS, INK = "#2f6f4f", "#9aa5ad", "#222222"


def environment_line(environment: Mapping[str, Any]) -> str:
    """The machine and versions in a line of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    gpu = f", {environment['gpu']['name']}" if environment["gpu"] else ""
    bundle = f", bundle {environment['bundle'][:12]}" if environment["bundle"] else ""
    return (
        f"{environment['cpu']}, {environment['threads']} threads on {environment['cores']} cores{gpu}; "
        f"{environment['date'][:10]}; {versions}{bundle}"
    )


def gigabytes(count: int | None) -> str:
    """Bytes for a table; "" where not measured."""
    return "" if count is None else f"{count / 1e9:.2f}"


def speed_table(result: Mapping[str, Any]) -> list[str]:
    """End to end, all systems; each against the engine in its own precision, and against the engine at its fastest."""
    rows = result["systems"]
    engines = [row for row in rows if row["name"].startswith(ENGINE) and not row["name"].endswith(FOLDER)]
    ours = {row["precision"]: row for row in sorted(engines, key=lambda row: row["images_per_s"])}
    lines = [
        "| system | images with masks a second | spread (IQR) | engine is faster by | in the same precision by "
        "| peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        spread, factors = Timing(tuple(row["seconds"])).spread, ["", ""]
        if not row["name"].startswith(ENGINE):
            against = rows[0], ours.get(row["precision"])
            factors = [(engine and f"{engine['images_per_s'] / row['images_per_s']:.2f}×") or "" for engine in against]
        lines.append(
            f"| {row['name']} | {row['images_per_s']:.2f} | {spread:.1%} | {' | '.join(factors)} "
            f"| {gigabytes(row['peak_memory'])} |"
        )
    return lines


def stage_table(result: Mapping[str, Any]) -> list[str]:
    """Every stage of the engine."""
    lines = [
        "| stage | images at once | ms | images/s | GFLOP | GFLOP/s | of the bound |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["stages"]:
        counted = row["flops"] and row["median_s"] > 0
        work = f"{row['flops'] / 1e9:.2f} | {row['flops_per_s'] / 1e9:.0f}" if counted else " | "
        share = f"{row['share_of_bound']:.0%}" if counted and row["share_of_bound"] else ""
        lines.append(
            f"| {row['name']} | {row['images']} | {1e3 * row['median_s']:.2f} | {row['images_per_s']:,.0f} "
            f"| {work} | {share} |"
        )
    return lines


def engine_form(item: tuple[str, Mapping[str, Any]]) -> str:
    """How an engine ran."""
    label, form = item
    return f"{ENGINE} {label.split()[0]} {form['batch']} × {form['lanes']} at once by {form['backend']}"


def peer_form(item: tuple[str, Mapping[str, Any]]) -> str:
    """How a peer ran."""
    name, form = item
    layout = " channels last" if form["channels_last"] and not name.startswith(tuple(EXPORTED)) else ""
    return f"{name} {form['batch']}{layout}"


def turns(result: Mapping[str, Any]) -> str:
    """Images to a turn, of the shortest and the longest."""
    counts = sorted({row["images"] for row in result["systems"]})
    return " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))


def speed_report(result: Mapping[str, Any]) -> list[str]:
    """The whole of a speed measurement in Markdown."""
    setting, bound = result["setting"], result["bound"]
    batches = [*map(engine_form, setting["engines"].items()), *map(peer_form, setting["peer_forms"].items())]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in bound["rates"].items())
    lines = [
        *speed_table(result),
        "",
        f"{setting['sampler']}, {setting['steps']} steps, guidance {setting['guidance_scale']:g}; "
        f"{turns(result)} images a turn, {setting['rounds']} turns each, in one process. "
        f"Batches: {', '.join(batches)}.",
        f"UNet: {result['unet_share']:.1%} of the engine's time.",
        *(f"{name}: {seconds:.0f} s to prepare." for name, seconds in result["prepare_s"].items()),
        *(f"{name}: left out, {reason}." for name, reason in result["omitted"].items()),
        "",
        *stage_table(result),
        "",
        f"Bound: {bound['flops_per_s'] / 1e9:,.0f} GFLOP/s, the best measured here ({rates})."
        if bound["flops_per_s"]
        else "Bound: not measured.",
        f"Measured on {environment_line(result['environment'])}.",
    ]
    return lines


def bar_chart(rows: Sequence[tuple[str, float, str]], title: str, ours: Sequence[str]) -> str:
    """An SVG of horizontal bars.

    Args:
        rows: label, value from 0, and what to write behind the bar.
        ours: labels to set off.
    """
    height, top = ROW * len(rows) + 56, max(value for _, value, _ in rows)
    left = LETTER * max(len(label) for label, _, _ in rows) + 24
    width = left + BARS + LETTER * max(len(told) for _, _, told in rows) + 24
    text = f'font-family="sans-serif" font-size="14" fill="{INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="26" {text} font-weight="bold">{escape(title)}</text>',
    ]
    for i, (label, value, told) in enumerate(rows):
        y, length = 44 + ROW * i, BARS * value / top
        colour = OURS if label in ours else THEIRS
        parts += [
            f'<text x="{left - 10}" y="{y + 17}" {text} text-anchor="end">{escape(label)}</text>',
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{ROW - 10}" rx="2" fill="{colour}"/>',
            f'<text x="{left + length + 8:.1f}" y="{y + 17}" {text}>{escape(told)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def speed_chart(result: Mapping[str, Any]) -> str:
    """Images with masks a second of all systems, the fastest on top."""
    rows = sorted(result["systems"], key=lambda row: -row["images_per_s"])
    bars = [(row["name"], row["images_per_s"], f"{row['images_per_s']:.2f}") for row in rows]
    setting = result["setting"]
    title = f"images with masks a second, {setting['sampler']}, {setting['steps']} steps"
    return bar_chart(bars, title, [row["name"] for row in rows if row["name"].startswith(ENGINE)])


def quality_chart(results: Sequence[Mapping[str, Any]]) -> str:
    """Images with masks a second of all settings, with the judge's findings behind the bars."""
    bars = [
        (row["name"], row["images_per_s"], f"{row['images_per_s']:.1f}; {row['found']:.0%} {row['miou']:.1%}")
        for row in results
    ]
    ours = [row["name"] for row in results if row["system"] == "engine"]
    return bar_chart(bars, "images with masks a second; objects found, head mIoU", ours)


def write_results(folder: Path, stem: str, record: Mapping[str, Any], lines: Sequence[str], chart: str = "") -> None:
    """Write STEM.json, STEM.md and, where there is one, STEM.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if chart:
        (folder / f"{stem}.svg").write_text(chart, encoding="utf-8")
