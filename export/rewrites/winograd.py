"""Convolutions of small images with a quarter of the products: Winograd's F(4x4, 3x3) in standard operators.

A tile of 4x4 output pixels needs 144 products a pair of channels in a plain convolution, and 36 here: with the tile's
6x6 input pixels d and the weights g it is A ((G g G^T) * (B d B^T)) A^T (Lavin and Gray, 2016, arXiv:1509.09308), where
the product in the middle is one matrix product over channels for each of the 36 points. G g G^T is computed when the
graph is opened. B and A take all tiles of an image at once, as matrices whose size is that of the image; that is why
images have to be small, and weights too: they grow fourfold.

Measured on one thread of ONNX Runtime, 32 images: 160 channels of 4x4 pixels 2.2 times as fast as its convolution, 96
of 8x8 1.9 times, 48 of 16x16 1.15 times. A convolution is exact to 1.2e-6 instead of 1.5e-7.
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from grounded_diffusion.export.rewrites.nodes import ONE_TO_ONE, add, constant, geometry, nodes, replace

LARGEST = 32  # latent height or width of models for which it is worth while
FEWEST_CHANNELS = 32
MOST_WEIGHTS = 2**16  # pairs of channels; transformed they take 9 MiB, and should stay in a processor's cache
TILE, TAPS = 4, 3
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)  # and infinity; with 0, 1, -1, 2, -2 the rounding error is twice as large


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [4,6], G [6,3] and B [6,6] of F(4,3): A ((G g) * (B d)) are the 4 sums of d[i:i+3] g (Toom and Cook)."""
    points, count = np.array(POINTS), TILE + TAPS - 1
    others = [np.delete(points, i) for i in range(count - 1)]
    scale = np.array([np.prod(point - rest) for point, rest in zip(points, others, strict=True)])
    last = np.eye(count)[-1:]  # the point at infinity sees the highest power only
    a = np.vstack([points[:, None] ** np.arange(TILE), last[:, -TILE:]]).T
    g = np.vstack([points[:, None] ** np.arange(TAPS) / scale[:, None], last[:, -TAPS:]])
    b = np.vstack([np.append(np.poly(rest)[::-1], 0) for rest in others] + [np.poly(points)[::-1]])
    return a, g, b


def winograd(model: onnx_ir.Model) -> None:
    """Rewrite all 3x3 convolutions of stride 1 whose channels suit."""
    levels: dict[tuple[str, ...], Level] = {}
    for conv in nodes(model, "Conv"):
        image, weight = conv.inputs[:2]
        if suits(conv, list(weight.shape)):
            axes = tuple(str(size) for size in image.shape[2:])
            if axes not in levels:
                levels[axes] = Level(model, image, f"winograd.{len(levels)}")
            replace(conv, levels[axes].convolve(conv))
    model.graph.sort()


def suits(conv: onnx_ir.Node, weight: list[int]) -> bool:
    """Whether a convolution is of 3x3 to the same size, and of channels with which this is faster."""
    plain = weight[2:] == [TAPS, TAPS] and geometry(conv) == {**ONE_TO_ONE, "pads": (1, 1, 1, 1)}
    return plain and min(weight[:2]) >= FEWEST_CHANNELS and weight[0] * weight[1] <= MOST_WEIGHTS


class Level:
    """What convolutions of images of one size have in common.

    Args:
        image: one of the images [N,C,H,W]; any N and C.
        name: of the constants.
    """

    def __init__(self, model: onnx_ir.Model, image: onnx_ir.Value, name: str):
        self.model, self.name = model, name
        self.height, self.width = (add(model, "Shape", [image], dict(start=i, end=i + 1)) for i in (2, 3))
        self.b_rows, self.a_rows, self.row_tiles = self.axis(self.height)
        self.b_columns, self.a_columns, _ = self.axis(self.width)
        rows, columns = (add(model, "Shape", [b], dict(start=0, end=1)) for b in (self.b_rows, self.b_columns))
        self.lines = self.sizes(0, self.width, -1)
        self.points = self.sizes(rows, columns, -1)

    def sizes(self, *parts: int | onnx_ir.Value) -> onnx_ir.Value:
        """A shape of numbers and values."""
        values = [self.ints(part) if isinstance(part, int) else part for part in parts]
        return add(self.model, "Concat", values, dict(axis=0))

    def ints(self, *numbers: int) -> onnx_ir.Value:
        """A constant vector."""
        return constant(self.model, f"winograd.ints.{numbers}", np.array(numbers, np.int64))

    def axis(self, size: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value, onnx_ir.Value]:
        """B [6t,s], A [s,6t] and t, of the t tiles of s pixels: the matrices of F(4,3), moved along unit vectors."""
        a, _, b = (matrix.astype(np.float32) for matrix in matrices())
        square = add(self.model, "ConstantOfShape", [self.sizes(size, size)])
        units = add(self.model, "Unsqueeze", [add(self.model, "EyeLike", [square]), self.ints(1)])  # [s,1,s]
        into = constant(self.model, "winograd.b", b[:, None])
        out = constant(self.model, "winograd.a", a.T[:, None])
        moved = add(self.model, "Conv", [units, into], dict(strides=[TILE], pads=[1, TILE]))  # [s,6,t]
        b_axis = add(self.model, "Transpose", [self.flat(moved)], dict(perm=[1, 0]))
        a_axis = self.flat(add(self.model, "Conv", [units, out], dict(strides=[TILE], pads=[0, TILE - 1])))
        return b_axis, a_axis, add(self.model, "Shape", [moved], dict(start=2, end=3))

    def flat(self, value: onnx_ir.Value) -> onnx_ir.Value:
        """All axes after the first as one."""
        return self.reshape(value, self.ints(0, -1))

    def reshape(self, value: onnx_ir.Value, shape: onnx_ir.Value) -> onnx_ir.Value:
        return add(self.model, "Reshape", [value, shape])

    def product(self, a: onnx_ir.Value, b: onnx_ir.Value) -> onnx_ir.Value:
        return add(self.model, "MatMul", [a, b])

    def convolve(self, conv: onnx_ir.Node) -> onnx_ir.Value:
        """The output [N,D,H,W] of a convolution."""
        image, weight, *bias = conv.inputs
        d, c = weight.shape[:2]
        g = matrices()[1].astype(np.float32)
        left, right = (constant(self.model, f"winograd.g{n}", m) for n, m in (("", g), (".t", g.T)))
        filters = self.product(left, self.product(weight, right))  # [D,C,6,6]
        filters = add(self.model, "Transpose", [filters], dict(perm=[2, 3, 1, 0]))
        filters = self.reshape(filters, self.ints(6, 1, 6, c, d))

        pixels = add(self.model, "Transpose", [image], dict(perm=[2, 3, 0, 1]))  # [H,W,N,C]
        rows = self.reshape(self.product(self.b_rows, self.flat(pixels)), self.lines)  # [6t,W,NC]
        tiles = self.product(self.b_columns, rows)  # [6t,6u,NC]
        tiles = self.reshape(tiles, self.sizes(6, self.row_tiles, 6, -1, c))  # [6,t,6,uN,C]
        made = self.reshape(self.product(tiles, filters), self.points)  # [6t,6u,ND]
        rows = self.product(self.a_rows, self.flat(self.product(self.a_columns, made)))  # [H,WND]
        pixels = self.reshape(rows, self.sizes(self.height, self.width, -1, d))  # [H,W,N,D]
        if bias:
            pixels = add(self.model, "Add", [pixels, *bias])
        return add(self.model, "Transpose", [pixels], dict(perm=[2, 3, 0, 1]))
