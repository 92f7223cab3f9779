"""Charts in SVG: a curve, and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, FOOT, TOP = 560, 300, 50, 150, 40, 20  # pixels
ROW, LETTER, BARS = 18, 7, 320
COLOURS = ("#2f6f4f", "#c0653a", "#3a6ea5", "#8a6aa8", "#9aa5ad")
INK, GRID = "#222222", "#dddddd"


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """A whole picture."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
    return head + 'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], axis: str) -> str:
    """Lines of (x, per cent) points, each with its name at its end; x in the order given, at even distances."""
    places = sorted({x for points in lines.values() for x, _ in points})
    across = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * places.index(x) / max(1, len(places) - 1)
    up = lambda y: HEIGHT - FOOT - (HEIGHT - FOOT - TOP) * y / 100
    parts = [text(LEFT, HEIGHT - 6, axis)]
    for y in range(0, 101, 20):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.0f}" y2="{up(y):.0f}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, up(y) + 4, str(y), "end"))
    parts += [text(across(x), HEIGHT - FOOT + 16, f"{x:g}", "middle") for x in places]
    ends: list[float] = []
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        end = up(points[-1][1])
        while any(abs(end - other) < 13 for other in ends):  # names do not stand on one another
            end += 13
        ends.append(end)
        parts.append(text(WIDTH - RIGHT + 8, end + 4, name, colour=colour))
    return svg(WIDTH, HEIGHT, parts)


def bars(values: Mapping[str, float], marked: Sequence[str] = ()) -> str:
    """Bars of per cents in the order given; those of `marked` names in another colour."""
    left = LETTER * max(map(len, values)) + 12
    parts = []
    for k, (name, value) in enumerate(values.items()):
        y = 8 + k * ROW
        colour = COLOURS[1 if name in marked else 0]
        parts.append(text(left - 6, y + 12, name, "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{BARS * value / 100:.1f}" height="{ROW - 4}" fill="{colour}"/>')
        parts.append(text(left + BARS * value / 100 + 5, y + 12, f"{value:.1f}"))
    return svg(left + BARS + 50, 16 + ROW * len(values), parts)
