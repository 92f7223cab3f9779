"""A small rasteriser: a mesh seen from a side, as a premultiplied RGBA sprite. NumPy alone."""

from __future__ import annotations

import numpy as np

from grounded_diffusion.training.things.meshes import Mesh

DISTANCE = 4.5  # of the camera, in half extents of the mesh
LIGHT = np.array([0.4, 0.7, 0.6]) / np.linalg.norm([0.4, 0.7, 0.6])
OPAQUE = 0.35  # fragments below this opacity are not drawn
CANDIDATES = 1 << 20  # (triangle, pixel) pairs looked at at once


def turn(azimuth: float, elevation: float) -> np.ndarray:
    """Rotation [3,3] that shows a mesh from `azimuth` and `elevation` degrees; 0, 0 is its front."""
    (ca, ce), (sa, se) = (f(np.deg2rad([azimuth, elevation])) for f in (np.cos, np.sin))
    return np.array([[1, 0, 0], [0, ce, -se], [0, se, ce]]) @ np.array([[ca, 0, sa], [0, 1, 0], [-sa, 0, ca]])


def project(points: np.ndarray, size: int, fill: float) -> np.ndarray:
    """Points [T,3,3] in perspective -> pixels x, y and depth [T,3,3], centred and scaled to fill the square."""
    low, high = points.min((0, 1)), points.max((0, 1))
    points = (points - (low + high) / 2) / (np.abs(high - low).max() / 2)
    flat = points[..., :2] * (DISTANCE / (DISTANCE - points[..., 2:]))
    low, high = flat.min((0, 1)), flat.max((0, 1))
    flat = (flat - (low + high) / 2) * (size * fill / (high - low).max()) * [1, -1] + size / 2
    return np.concatenate([flat, -points[..., 2:]], -1)


def fragments(corners: np.ndarray, size: int):
    """Yields (triangle [n], pixel [n], barycentric [n,3]) of the pixels inside the triangles [T,3,3], in parts."""
    low = np.clip(np.floor(corners[..., :2].min(1)), 0, size - 1).astype(int)
    high = np.clip(np.ceil(corners[..., :2].max(1)), 0, size - 1).astype(int)
    edges = corners[:, 1:, :2] - corners[:, :1, :2]
    area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 1, 0] * edges[:, 0, 1]
    width, height = (high - low + 1).T
    count = np.where(np.abs(area) > 1e-9, width * height, 0)
    part = np.cumsum(count) // CANDIDATES
    for k in np.unique(part):
        chosen = np.flatnonzero(part == k)
        index = np.repeat(chosen, count[chosen])
        within = np.arange(len(index)) - np.repeat(np.cumsum(count[chosen]) - count[chosen], count[chosen])
        x, y = low[index, 0] + within % width[index], low[index, 1] + within // width[index]
        to = np.stack([x, y], -1) + 0.5 - corners[index, 0, :2]
        b = (to[:, 0] * edges[index, 1, 1] - edges[index, 1, 0] * to[:, 1]) / area[index]
        c = (edges[index, 0, 0] * to[:, 1] - to[:, 0] * edges[index, 0, 1]) / area[index]
        weights = np.stack([1 - b - c, b, c], -1)
        inside = (weights >= 0).all(-1)
        yield index[inside], (y * size + x)[inside], weights[inside]


def surface(mesh: Mesh, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colour and opacity [n,4] at points of triangles."""
    uv = np.einsum("nk,nkc->nc", weights, mesh.uvs[index])
    material, colours = mesh.material[index], np.empty((len(index), 4))
    for m, what in enumerate(mesh.materials):
        mine = np.flatnonzero(material == m)
        colours[mine] = (*what.colour, what.opacity)
        if what.texture is not None and len(mine):
            h, w, _ = what.texture.shape
            u, v = (uv[mine] % 1).T
            texel = what.texture[((1 - v) * h).astype(int) % h, (u * w).astype(int) % w]
            colours[mine] = texel * [1, 1, 1, what.opacity]
    return colours


def shade(normals: np.ndarray) -> np.ndarray:
    """Brightness [n] of surfaces with these normals [n,3]: ambient, sky and one sun; both sides are lit alike."""
    normals = normals / (np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9)
    normals = np.where(normals[:, 2:] < 0, -normals, normals)
    return 0.35 + 0.2 * (0.5 + 0.5 * normals[:, 1]) + 0.6 * np.maximum(0, normals @ LIGHT)


def render(mesh: Mesh, azimuth: float, elevation: float, size: int, fill: float = 0.98, samples: int = 3) -> np.ndarray:
    """A premultiplied RGBA view [size,size,4] in [0,1].

    Args:
        azimuth, elevation: of the camera, in degrees.
        fill: the longer side of the object, as a share of the square.
        samples: per pixel and axis.
    """
    rotation, side = turn(azimuth, elevation), size * samples
    corners, normals = project(mesh.points @ rotation.T, side, fill), mesh.normals @ rotation.T
    depth, image = np.full(side * side, np.inf), np.zeros((side * side, 4))
    for index, pixel, weights in fragments(corners, side):
        colours = surface(mesh, index, weights)
        z = np.einsum("nk,nk->n", weights, corners[index, :, 2])
        drawn = colours[:, 3] >= OPAQUE
        np.minimum.at(depth, pixel[drawn], z[drawn])
        seen = np.flatnonzero(drawn & (z <= depth[pixel]))
        light = shade(np.einsum("nk,nkc->nc", weights[seen], normals[index[seen]]))
        image[pixel[seen], :3] = np.clip(colours[seen, :3] * light[:, None], 0, 1)
        image[pixel[seen], 3] = 1
    return image.reshape(size, samples, size, samples, 4).mean((1, 3))
