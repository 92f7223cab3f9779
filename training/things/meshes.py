"""Textured triangle meshes out of two Debian packages: OBJ of sweethome3d-furniture, PMD of 0ad-data."""

from __future__ import annotations

import io
import posixpath
import re
import struct
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

TEXTURE = 256  # longest side in pixels; a sprite is 96
FURNITURE = "usr/share/sweethome3d/furniture"
ZERO_AD = "usr/share/games/0ad/mods/public/public.zip"


@dataclass(frozen=True, slots=True)
class Material:
    """One colour, opacity, and perhaps a texture [h,w,4] in [0,1] that replaces the colour."""

    colour: tuple[float, float, float] = (0.7, 0.7, 0.7)
    opacity: float = 1.0
    texture: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """T triangles, y up, the front towards +z.

    Attributes:
        points: [T,3,3] corners.
        normals: [T,3,3] at the corners, of any length.
        uvs: [T,3,2] texture coordinates, v up.
        material: [T] index into materials.
        materials: what the triangles are made of.
    """

    points: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    material: np.ndarray
    materials: list[Material]


def join_meshes(meshes: list[Mesh]) -> Mesh:
    """Several meshes in one frame as one."""
    first = np.cumsum([0, *(len(mesh.materials) for mesh in meshes)])
    return Mesh(
        *(np.concatenate([getattr(mesh, part) for mesh in meshes]) for part in ("points", "normals", "uvs")),
        np.concatenate([mesh.material + start for mesh, start in zip(meshes, first[:-1], strict=True)]),
        [material for mesh in meshes for material in mesh.materials],
    )


def read_texture(data: bytes, opaque: bool = False) -> np.ndarray:
    """An image file as RGBA [h,w,4] in [0,1]."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image.thumbnail((TEXTURE, TEXTURE))
    texture = np.asarray(image, np.float32) / 255
    return np.concatenate([texture[..., :3], np.ones_like(texture[..., 3:])], -1) if opaque else texture


class Furniture:
    """The catalogues of sweethome3d-furniture.

    Args:
        root: the folder the package was unpacked in.

    Attributes:
        models: "library#id" -> the model's properties, with "library" and "licence" among them.
    """

    LICENCES = {"BlendSwap-CC-0": "CC0-1.0", "BlendSwap-CC-BY": "CC-BY-3.0", "Scopia": "CC-BY-3.0"}  # noqa: RUF012

    def __init__(self, root: Path):
        self.archives, self.models = {}, {}
        for file in sorted((root / FURNITURE).glob("*.sh3f")):
            archive = self.archives[file.stem] = zipfile.ZipFile(file)
            catalogue = next(n for n in archive.namelist() if n.endswith("PluginFurnitureCatalog.properties"))
            rows = defaultdict(dict)
            for key, row, value in re.findall(
                r"^(\w+)#(\d+)\s*=\s*(.*)$", archive.read(catalogue).decode("latin1"), re.M
            ):
                rows[row][key] = value.strip()
            licence = self.LICENCES.get(file.stem, "CC-BY-3.0-US")
            for row, entry in rows.items():
                self.models[f"{file.stem}#{row}"] = entry | dict(library=file.stem, licence=licence)

    def load(self, key: str) -> Mesh:
        """The mesh of a model, turned to its front."""
        entry = self.models[key]
        archive, path = self.archives[entry["library"]], unquote(entry["model"].lstrip("/"))
        if path.endswith(".zip"):
            archive = zipfile.ZipFile(io.BytesIO(archive.read(path)))
            path = next(n for n in archive.namelist() if n.lower().endswith(".obj"))
        mesh = read_obj(archive, path)
        if "modelRotation" not in entry:
            return mesh
        turn = np.array(entry["modelRotation"].split(), float).reshape(3, 3)
        return Mesh(mesh.points @ turn.T, mesh.normals @ turn.T, mesh.uvs, mesh.material, mesh.materials)


def read_materials(archive: zipfile.ZipFile, data: str, find) -> dict[str, Material]:
    """The materials of a Wavefront MTL file. `find` maps a file's name as written to its name in the archive."""
    tables, current = {}, {}
    for line in data.splitlines():
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "newmtl":
            current = tables.setdefault(rest, {})
        elif word == "Kd":
            current["colour"] = tuple(float(v) for v in rest.split()[:3])
        elif word == "d":
            current["opacity"] = float(rest.split()[-1])
        elif word == "map_Kd" and (name := find(rest) or find(rest.split()[-1])):
            current["texture"] = read_texture(archive.read(name))
    return {name: Material(**table) for name, table in tables.items()}


def read_obj(archive: zipfile.ZipFile, path: str) -> Mesh:
    """A Wavefront OBJ file with its materials; faces become fans of triangles."""
    folder, by_name = posixpath.dirname(path), {n.lower(): n for n in archive.namelist()}
    find = lambda name: by_name.get(posixpath.normpath(posixpath.join(folder, name.strip('" '))).lower())
    values = {"v": [], "vt": [[0.0, 0.0]], "vn": [[0.0, 0.0, 0.0]]}
    faces, materials, indices, current = [], [Material()], {}, 0
    corner = lambda text, kind: int(text) + (len(values[kind]) if text.startswith("-") else kind == "v" and -1)
    for line in archive.read(path).decode("latin1").splitlines():
        word, *rest = line.split() or [""]
        if word in values:
            values[word].append([float(v) for v in rest[: 2 if word == "vt" else 3]])
        elif word == "mtllib" and (name := find(line.split(None, 1)[1])):
            for title, material in read_materials(archive, archive.read(name).decode("latin1"), find).items():
                indices[title] = len(materials)
                materials.append(material)
        elif word == "usemtl":
            current = indices.get(" ".join(rest), 0)
        elif word == "f":
            split = [[*part.split("/"), "", ""][:3] for part in rest]
            corners = [(corner(v, "v"), corner(t or "0", "vt"), corner(n or "0", "vn")) for v, t, n in split]
            faces += [(corners[0], *corners[i : i + 2], (current,) * 3) for i in range(1, len(corners) - 1)]
    table = np.array(faces)  # [T,4,3]: three corners of (v, vt, vn), then the material
    points, uvs, normals = (np.array(values[k])[table[:, :3, i]] for i, k in enumerate(("v", "vt", "vn")))
    flat = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
    missing = np.abs(normals).sum(-1, keepdims=True) < 1e-6
    return Mesh(points, np.where(missing, flat[:, None], normals), uvs, table[:, 3, 0], materials)


class ZeroAD:
    """Actors of 0ad-data: a mesh, a skin, and other actors fixed to points of it.

    Args:
        root: the folder the package was unpacked in.
    """

    licence, author = "CC-BY-SA-3.0", "Wildfire Games"

    def __init__(self, root: Path):
        self.archive = zipfile.ZipFile(root / ZERO_AD)
        self.names = set(self.archive.namelist())

    def read(self, *candidates: str) -> bytes:
        return self.archive.read(next(name for name in candidates if name in self.names))

    def load(self, mesh: str, texture: str, cut_out: bool = False) -> Mesh:
        """A mesh with a skin. Skins use their alpha for the player's colour, unless it cuts out what is transparent."""
        stem = posixpath.splitext(mesh)[0]
        points, normals, uvs = read_pmd(self.read(f"art/meshes/{stem}.dae.cached.pmd", f"art/meshes/{stem}.pmd"))
        skin = f"art/textures/skins/{texture}"
        data = self.read(f"{skin}.cached.dds", skin)
        return Mesh(
            points, normals, uvs, np.zeros(len(points), int), [Material(texture=read_texture(data, not cut_out))]
        )


def read_pmd(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points [T,3,3], normals [T,3,3] and texture coordinates [T,3,2] of Pyrogenesis' mesh format, z towards us."""
    if data[:4] != b"PSMD":
        raise ValueError("not a PMD mesh")
    version, _, vertices = struct.unpack_from("<III", data, 4)
    sets, start = (struct.unpack_from("<I", data, 16)[0], 20) if version >= 4 else (1, 16)
    layout = [("p", "<f4", 3), ("n", "<f4", 3), ("t", "<f4", (sets, 2)), ("bones", "u1", 4), ("weights", "<f4", 4)]
    vertex = np.frombuffer(data, np.dtype(layout), vertices, start)
    start += vertex.nbytes
    faces = np.frombuffer(data, "<u2", 3 * struct.unpack_from("<I", data, start)[0], start + 4).reshape(-1, 3)
    mirror = np.array([1.0, 1.0, -1.0])
    return vertex["p"][faces] * mirror, vertex["n"][faces] * mirror, vertex["t"][:, 0][faces].astype(float)
