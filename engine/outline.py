"""A mask's outline as an SVG path, small enough to put thousands of them into one page."""

from __future__ import annotations

import numpy as np

GRID = 128  # cells along the longer side; larger masks are reduced to this


def reduce_mask(mask: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Mask bool [H,W] with at most `grid` cells a side: a cell is set where at least half of its pixels are."""
    height, width = mask.shape
    cell = -(-max(height, width) // grid)
    if cell == 1:
        return mask
    padded = np.pad(mask, ((0, -height % cell), (0, -width % cell)))
    cells = padded.reshape(padded.shape[0] // cell, cell, padded.shape[1] // cell, cell)
    return cells.mean((1, 3)) >= 0.5


def boundary_edges(mask: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Unit steps around the set cells, clockwise: from each corner (x, y) the directions (dx, dy) that leave it."""
    inside = np.pad(mask, 1)
    core = inside[1:-1, 1:-1]
    sides = (  # neighbour on that side, corner the edge starts at, direction
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    )
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, (cx, cy), direction in sides:
        ys, xs = np.nonzero(core & ~neighbour)
        for corner in zip((xs + cx).tolist(), (ys + cy).tolist(), strict=True):
            edges.setdefault(corner, []).append(direction)
    return edges


def outline(mask: np.ndarray) -> str:
    """SVG path data of a bool mask [H,W] in the cells of `reduce_mask`; "" when it is empty.

    Holes run the other way round, so that either fill rule leaves them open.
    """
    edges = boundary_edges(reduce_mask(mask))
    path = []
    while edges:
        start = corner = next(iter(edges))
        x, y = start
        path.append(f"M{x} {y}")
        heading, length = None, 0
        while True:
            leaving = edges[corner]
            right = (-heading[1], heading[0]) if heading else leaving[0]
            # Where two cells touch at a corner, turning right keeps their outlines apart.
            step = leaving.pop(leaving.index(right) if right in leaving else 0)
            if not leaving:
                del edges[corner]
            if step != heading and length:
                path.append(move(heading, length))
                length = 0
            heading, length = step, length + 1
            corner = (corner[0] + step[0], corner[1] + step[1])
            if corner == start:
                break
        path.append("z")  # closes along the last heading
    return "".join(path)


def move(heading: tuple[int, int], length: int) -> str:
    """A relative horizontal or vertical line."""
    dx, dy = heading
    return f"h{dx * length}" if dx else f"v{dy * length}"
