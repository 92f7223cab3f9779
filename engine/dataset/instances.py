"""Connected parts of a class's mask as objects of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np

from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.sampling.sample import ObjectMask

VOID = 255  # label of pixels that belong to no object, as in the label maps
MOST = 254  # labels are bytes; 0 is the background


def by_components(record: Record, share: float) -> Record:
    """A record whose objects are the connected parts of its objects' masks, the largest of a class first.

    Pixels that touch at a corner only belong to different parts, as in polygons. A part below `share` of the image is
    left out, and void in the label map. An object without any part that is large enough stays, with an empty mask. A
    part has the score of the whole.
    """
    least = max(1, math.ceil(share * record.width * record.height))
    objects: list[ObjectMask] = []
    before = record.labels
    nothing = lambda: np.zeros(before.shape, np.bool_)
    labels = np.where(before == VOID, np.uint8(VOID), np.uint8(0))
    for thing in record.objects:
        on_top = before == thing.label
        labels[on_top] = VOID
        for part in large_parts(thing.mask, least, MOST - len(objects)):
            label = len(objects) + 1
            labels[on_top & part] = label
            box = cast(tuple[int, int, int, int], tuple(mask_box(part)))
            one = replace(thing, label=label, area=int(part.sum()), box=box, read_mask=lambda part=part: part)
            objects.append(one)
        if len(objects) < MOST and (not objects or objects[-1].name != thing.name):
            objects.append(replace(thing, label=len(objects) + 1, area=0, box=(0, 0, 0, 0), read_mask=nothing))
    return replace(record, objects=tuple(objects), read_labels=lambda: labels)


def large_parts(mask: np.ndarray, least: int, most: int) -> list[np.ndarray]:
    """The connected parts of a bool mask [H,W] of at least so many pixels, the largest first and at most so many."""
    numbers, count = components(mask)
    areas = np.bincount(numbers.ravel(), minlength=count + 1)
    order = sorted(range(1, count + 1), key=lambda number: (-areas[number], number))
    return [numbers == number for number in order if areas[number] >= least][:most]


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """(int32 [H,W] with 0 outside the mask and 1, 2, ... in its parts, in the order of their first pixels; how many).

    Works on the runs of the rows: a run joins those of the row above that it shares a column with.
    """
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    first = np.searchsorted(rows, np.arange(mask.shape[0] + 1)).tolist()  # of each row's runs
    begin, end = starts.tolist(), ends.tolist()
    for row in range(1, mask.shape[0]):
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if begin[above] < end[here] and begin[here] < end[above]:
                one, other = root(above), root(here)
                parent[max(one, other)] = min(one, other)
            if end[above] < end[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(rows))], np.int64)
    found, numbers = np.unique(roots, return_inverse=True)
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(numbers.astype(np.int32) + 1, ends - starts)
    return labels, len(found)


def mask_box(mask: np.ndarray) -> list[int]:
    """x, y, width, height of a bool mask [H,W]; zeros when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
