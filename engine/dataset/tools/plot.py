"""Statistics of a data set as one SVG: a line a class with its count and histograms, then the overlaps of pairs."""

from __future__ import annotations

from html import escape
from typing import Any

ROW, NAME, BAR, BIN = 22, 170, 220, 14  # pixels: of a line, its name, its longest bar, a bin of its histograms
AREAS, SCORES = 460, 640  # where the histograms begin
BLUE, ORANGE, GREY = "#3b6fd4", "#e08a2e", "#8a8d94"
SHOWN_PAIRS = 40  # those that overlap most often


def plot(result: dict[str, Any]) -> str:
    """An SVG of `statistics`."""
    classes = sorted(result["classes"].items(), key=lambda item: (-item[1]["images"], item[0]))
    pairs = sorted(result["overlaps"], key=lambda pair: (-pair["overlapping"], pair["classes"]))[:SHOWN_PAIRS]
    parts = class_lines(1, f"{result['images']} images, {result['objects']} objects", classes)
    if pairs:
        parts += pair_lines(len(classes) + 3, pairs)
    width, height = SCORES + 10 * BIN + 20, (len(classes) + len(pairs) + 4) * ROW
    style = "text{font:12px system-ui,sans-serif;fill:#333}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def class_lines(line: int, title: str, classes: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line a class, from `line` on: images that ask for it and that show it, areas, scores."""
    parts = [text(NAME, line, title), text(AREAS, line, "areas, 0 to 100%"), text(SCORES, line, "scores, 0 to 1")]
    most = max((entry["images"] for _, entry in classes), default=1)
    for at, (name, entry) in enumerate(classes, line + 1):
        seen, scale = entry["images"] - entry["empty"], BAR / most
        parts.append(text(NAME - 8, at, name, "end"))
        parts.append(bar(NAME, at, scale * entry["images"], GREY, f"{entry['images']} images"))
        parts.append(bar(NAME, at, scale * seen, BLUE, f"{seen} with a mask"))
        parts.append(text(NAME + scale * entry["images"] + 4, at, str(entry["images"])))
        parts += histogram(AREAS, at, entry["areas"], BLUE) + histogram(SCORES, at, entry["scores"], ORANGE)
    return parts


def pair_lines(line: int, pairs: list[dict[str, Any]]) -> list[str]:
    """A line a pair, from `line` on: images that ask for both, and those in which the masks overlap."""
    parts = [text(NAME, line, "images in which two masks overlap, of those that ask for both")]
    scale = BAR / max(pair["images"] for pair in pairs)
    for at, pair in enumerate(pairs, line + 1):
        told = f"{pair['overlapping']} of {pair['images']}"
        parts.append(text(NAME - 8, at, " + ".join(pair["classes"]), "end"))
        parts.append(bar(NAME, at, scale * pair["images"], GREY, told))
        parts.append(bar(NAME, at, scale * pair["overlapping"], ORANGE, told))
        parts.append(text(AREAS, at, f"{told}, mean IoU {pair['mean_iou']:.2f}"))
    return parts


def text(x: float, line: int, words: str, anchor: str = "start") -> str:
    """Words on a line; a name that is too long for its column is cut."""
    words = words if anchor == "start" or len(words) <= 24 else words[:23] + "…"
    return f'<text x="{x:.1f}" y="{line * ROW - 6}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(x: float, line: int, width: float, colour: str, told: str) -> str:
    """A horizontal bar, which tells its number when pointed at."""
    return (
        f'<rect x="{x}" y="{(line - 1) * ROW + 4}" width="{width:.1f}" height="{ROW - 8}" fill="{colour}">'
        f"<title>{escape(told)}</title></rect>"
    )


def histogram(x: float, line: int, bins: list[int], colour: str) -> list[str]:
    """Upright bars side by side, the longest as high as the line."""
    most = max(max(bins), 1)
    parts = [f'<rect x="{x}" y="{line * ROW - 2}" width="{BIN * len(bins)}" height="1" fill="{GREY}"/>']
    for k, count in enumerate(bins):
        height = (ROW - 4) * count / most
        parts.append(
            f'<rect x="{x + k * BIN}" y="{line * ROW - 2 - height:.1f}" width="{BIN - 2}" height="{height:.1f}" '
            f'fill="{colour}"><title>{k * 10}-{k * 10 + 10}%: {count}</title></rect>'
        )
    return parts
