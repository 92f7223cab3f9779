"""A mask's outlines as polygons along the edges of its pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Points = list[tuple[int, int]]


def contours(mask: np.ndarray) -> tuple[list[Points], list[Points]]:
    """(outer outlines, holes) of a bool mask [H,W], corners in (x, y), at least four each.

    Pixels that touch at a corner only belong to different outlines.
    """
    edges, outer, holes = boundary_edges(mask), [], []
    while edges:
        start = corner = next(iter(edges))
        heading, points = None, []
        while True:
            leaving = edges[corner]
            right = (-heading[1], heading[0]) if heading else leaving[0]
            step = leaving.pop(leaving.index(right) if right in leaving else 0)
            if not leaving:
                del edges[corner]
            if step != heading:
                points.append(corner)
            heading, corner = step, (corner[0] + step[0], corner[1] + step[1])
            if corner == start:
                break
        (outer if signed_area(points) > 0 else holes).append(points)
    return outer, holes


def signed_area(points: Points) -> int:
    """Area, positive when the points run clockwise on the screen."""
    following = [*points[1:], points[0]]
    return sum(x * v - u * y for (x, y), (u, v) in zip(points, following, strict=True)) // 2


def solid_polygons(mask: np.ndarray) -> list[Points]:
    """Polygons without holes that together cover the mask exactly.

    A mask with holes is cut into strips, right after the first column of every hole. What a strip has of a hole
    touches the strip's edge, so no hole is left.
    """
    outer, holes = contours(mask)
    if not holes:
        return outer
    cuts = sorted({0, mask.shape[1], *(min(x for x, _ in points) + 1 for points in holes)})
    strips = [(left, contours(mask[:, left:right])[0]) for left, right in pairwise(cuts)]
    return [[(x + left, y) for x, y in points] for left, outlines in strips for points in outlines]


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
