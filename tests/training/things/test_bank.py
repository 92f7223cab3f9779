"""The bank: whole, licensed, and drawn by a rasteriser that is right on meshes whose picture is known."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.training.things.bank import FOLDER, load_backgrounds, load_sprites, read_index
from grounded_diffusion.training.things.meanings import read_meanings
from grounded_diffusion.training.things.meshes import Material, Mesh, join_meshes, read_obj, read_pmd
from grounded_diffusion.training.things.raster import DISTANCE, render
from grounded_diffusion.training.things.render_bank import LICENCES, read_selection, save_strip, write_notices

VOC = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike, person,
potted plant, sheep, sofa, train, tv monitor"""


def square(z: float, colour: tuple[float, float, float], side: float = 2.0, opacity: float = 1.0) -> Mesh:
    """A square in the plane z, facing us."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * side / 2
    points = np.concatenate([corners, np.full((4, 1), z)], 1)[[[0, 1, 2], [0, 2, 3]]]
    uvs = (corners / side + 0.5)[[[0, 1, 2], [0, 2, 3]]]
    normals = np.broadcast_to([0.0, 0.0, 1.0], points.shape)
    return Mesh(points, normals, uvs, np.zeros(2, int), [Material(colour, opacity)])


def test_every_name_has_its_models_and_every_voc_name_is_there():
    index, selection = read_index()["names"], read_selection()
    assert list(index) == list(selection)
    assert list(index)[:20] == re.split(r",\s+", VOC)
    assert len(index) >= 60
    for name, entry in selection.items():
        models = index[name]["models"]
        assert [m["source"] for m in models] == entry["models"] + entry.get("held_out", [])
        assert [m["source"] for m in models if m["held_out"]] == entry.get("held_out", [])


def test_every_picture_is_listed_with_its_author_and_licence():
    models = [model for entry in read_index()["names"].values() for model in entry["models"]]
    assert {m["file"] for m in models} == {
        file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*.webp") if file.parent.name != "backgrounds"
    }
    for model in models:
        folder, file = model["file"].split("/")
        row = f"| {file} | {model['title']} | {model['author']} | {model['licence']} |"
        assert row in (FOLDER / folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
        assert (folder == "0ad") == (model["licence"] == "CC-BY-SA-3.0")
        assert model["licence"] in LICENCES


def test_notices_are_what_the_script_writes(tmp_path):
    for folder in ("sweethome3d", "0ad", "backgrounds"):
        (tmp_path / folder).mkdir()
    write_notices(read_index(), tmp_path)
    for file in tmp_path.rglob("*.md"):
        assert file.read_bytes() == (FOLDER / file.relative_to(tmp_path)).read_bytes()


def test_the_bank_is_small_and_its_pictures_are_whole():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) < 6 << 20
    names = list(read_index()["names"])
    sprites = load_sprites(names, 48, models=0, views=0)
    held = load_sprites(names, 48, models=0, views=0, held_out=True)
    for bank in (sprites, held):
        alpha = bank.pictures[:, 3]
        assert (alpha.mean((1, 2)) > 0.03).all(), "an almost empty sprite"
        columns, rows = ((alpha.amax(axis) > 0.1).sum(1) for axis in (1, 2))
        assert (columns.maximum(rows) >= 44).all(), "a sprite that does not fill its tile"
    backgrounds, surfaces = load_backgrounds(48)
    assert len(backgrounds) % len(surfaces) == 0
    assert backgrounds.std((1, 2, 3)).min() > 0.01


def test_words_that_mean_alike_are_alike():
    meanings = read_meanings()
    cosine = lambda a, b: (meanings[a] @ meanings[b] / meanings[a].norm() / meanings[b].norm()).item()
    assert cosine("dog", "cat") > cosine("dog", "truck")
    assert cosine("truck", "bus") > cosine("truck", "elephant")
    assert all(set(name.split()) <= set(meanings) for name in read_index()["names"])


def test_the_nearer_of_two_squares_is_seen_whichever_is_drawn_first():
    near, far = square(0.5, (1, 0, 0), side=1.0), square(-0.5, (0, 0, 1))
    for meshes in ([near, far], [far, near]):
        image = render(join_meshes(meshes), 0, 0, 32)
        assert image[16, 16].argmax() in (0, 3)
        assert image[16, 16, 2] == 0
        assert image[3, 16, 2] > 0.3
        assert image[3, 16, 0] == 0


def test_a_square_fills_what_it_should_and_turns_in_perspective():
    """Turned by 60 degrees its near edge is the longest side, and its outline a trapezium."""
    areas = [render(square(0, (1, 1, 1)), side, 0, 64, fill=0.75)[..., 3].mean() for side in (0, 60)]
    near, far = (DISTANCE / (DISTANCE - way * np.sqrt(0.75)) for way in (1, -1))
    trapezium = 0.5 * (near + far) * (near + far)  # width by mean height, of a square with sides of 2
    assert areas[0] == pytest.approx(0.75**2, rel=0.02)
    assert areas[1] == pytest.approx(trapezium * (0.75 / (2 * near)) ** 2, rel=0.02)


def test_what_is_nearly_transparent_is_not_drawn():
    glass = join_meshes([square(0.5, (1, 0, 0), opacity=0.2), square(0, (0, 1, 0))])
    image = render(glass, 0, 0, 16)
    assert image[..., 0].max() == 0
    assert image[8, 8, 1] > 0.3


def test_an_obj_file_is_read_with_its_materials_and_its_texture_the_right_way_up():
    data = io.BytesIO()
    picture = Image.new("RGB", (2, 2), "red")
    picture.paste((0, 0, 255), (0, 1, 2, 2))  # red above, blue below
    png = io.BytesIO()
    picture.save(png, "png")
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(
            "m/box.obj",
            "mtllib Box.MTL\nv -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\n"
            "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl paint\nf 1/1 2/2 3/3 -1/-1\n",
        )
        archive.writestr("m/box.mtl", "newmtl paint\nKd 0 1 0\nmap_Kd p.png\n")
        archive.writestr("m/p.png", png.getvalue())
    mesh = read_obj(zipfile.ZipFile(data), "m/box.obj")
    assert mesh.points.shape == (2, 3, 3)
    image = render(mesh, 0, 0, 16)
    assert image[3, 8, :3].argmax() == 0
    assert image[12, 8, :3].argmax() == 2
    assert image[..., 1].max() < 0.01


def test_a_pmd_mesh_is_read_and_turned_towards_us():
    vertices = [(p, (0, 0, -1)) for p in ((-1, -1, 0), (1, -1, 0), (0, 1, -2))]
    body = b"".join(struct.pack("<8f4B4f", *p, *n, 0.5, 0.25, 0, 0, 0, 0, 1, 0, 0, 0) for p, n in vertices)
    data = b"PSMD" + struct.pack("<III", 3, 0, 3) + body + struct.pack("<I3H", 1, 0, 1, 2)
    points, normals, uvs = read_pmd(data)
    assert points[0].tolist() == [[-1, -1, 0], [1, -1, 0], [0, 1, 2]]
    assert (normals[0, :, 2] == 1).all()
    assert uvs[0, 0].tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match="not a PMD mesh"):
        read_pmd(b"OBJ!")


def test_a_strip_keeps_transparency_exactly(tmp_path):
    tiles = np.random.default_rng(0).random((2, 16, 16, 4))
    tiles[..., :3] *= tiles[..., 3:]
    save_strip(tiles, tmp_path / "strip.webp")
    alpha = np.asarray(Image.open(tmp_path / "strip.webp"))[..., 3]
    assert np.array_equal(alpha, (np.concatenate(list(tiles), 1)[..., 3] * 255).round())
