"""The page to look at a data set: its data files, its size, flat memory."""

import json
import re
import tracemalloc

import pytest

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset import preview
from grounded_diffusion.engine.dataset.preview import BLOCK, CHUNK, write_preview
from grounded_diffusion.engine.dataset.storage.open import open_storage

NAMES = [f"class {k}" for k in range(50)]


def make_rows(count, masks=True):
    for index in range(count):
        things = [NAMES[index % 50], NAMES[(7 * index + 1) % 50]]
        things = list(dict.fromkeys(things))
        files = {"mask": f"masks/{index // 1000:03d}/{index:06d}.png"} if masks else {}
        yield {
            "id": f"{index:06d}", "index": index, "prompt": f'a </script> "{things[0]}"\u2028 and n° {index}',
            "seed": 2**62 + 1, "draw": index, "width": 64, "height": 48, "capture_timestep": 1.0,
            "image": f"images/{index // 1000:03d}/{index:06d}.png", **files,
            "objects": [{"name": name, "label": k, "area": 768, "box": [0, 0, 1, 1], "score": 0.5}
                        for k, name in enumerate(things, 1)],
        }  # fmt: skip


def read(path):
    """The values that a data file hands to the page."""
    call = re.fullmatch(r"gd\.(\w+)\((.*)\);\n", path.read_text(encoding="utf-8"), re.DOTALL)
    return call[1], json.loads(f"[{call[2]}]")


def places(path):
    """name -> positions within the block."""
    function, (_, steps) = read(path)
    assert function == "places"
    return {name: [sum(each[: k + 1]) for k in range(len(each))] for name, each in steps.items()}


def test_data_files(tmp_path):
    count = CHUNK + 3
    assert (
        write_preview(open_storage(tmp_path), make_rows(count), {"steps": 20, "seed": 7, "format": "folder"}) == count
    )
    function, (index,) = read(tmp_path / "preview/index.js")
    assert function == "index"
    assert index == {
        "samples": count, "chunk": CHUNK, "block": BLOCK, "size": [64, 48], "settings": "steps 20 · seed 7",
        "classes": index["classes"],
    }  # fmt: skip
    rows = list(make_rows(count))
    asked = {name: [k for k, row in enumerate(rows) if name in [o["name"] for o in row["objects"]]] for name in NAMES}
    assert dict(index["classes"]) == {name: len(where) for name, where in asked.items()}
    assert places(tmp_path / "preview/block-000.js") == asked
    (first, one), (second, two) = (read(tmp_path / f"preview/{k:06d}.js")[1] for k in (0, 1))
    assert (first, second, len(one), len(two)) == (0, 1, CHUNK, 3)
    id, prompt, image, mask, seed, width, height, objects = two[2]
    assert (id, prompt, image) == ("000502", rows[502]["prompt"], "images/000/000502.png")
    assert (mask, seed, width, height) == ("masks/000/000502.png", str(2**62 + 1), 64, 48)
    assert objects[0] == [rows[502]["objects"][0]["name"], 1, 0.25, 0.5, None]


def test_a_shorter_data_set_leaves_nothing_of_a_longer_one(tmp_path):
    storage = open_storage(tmp_path)
    write_preview(storage, make_rows(2 * CHUNK), {})
    write_preview(storage, make_rows(5, masks=False), {})
    assert storage.list("preview") == ["000000.js", "block-000.js", "index.js"]
    assert read(tmp_path / "preview/000000.js")[1][1][0][3] is None


@pytest.mark.parametrize("count", [0, 1, 40, 41, 80])
def test_blocks(tmp_path, monkeypatch, count):
    """Every block of samples has its positions, also when the last one is full."""
    monkeypatch.setattr(preview, "CHUNK", 10)
    monkeypatch.setattr(preview, "BLOCK", 40)
    write_preview(open_storage(tmp_path), make_rows(count), {})
    blocks = sorted((tmp_path / "preview").glob("block-*"))
    assert len(blocks) == -(-count // 40)
    found = {(b * 40 + k, name) for b, file in enumerate(blocks) for name, ks in places(file).items() for k in ks}
    assert found == {(k, o["name"]) for k, row in enumerate(make_rows(count)) for o in row["objects"]}


def test_a_hundred_thousand_samples(tmp_path):
    """The page stays small, and so does every data file."""
    write_preview(open_storage(tmp_path), make_rows(100_000), {})
    assert (tmp_path / "index.html").stat().st_size < 100_000
    sizes = [file.stat().st_size for file in (tmp_path / "preview").iterdir()]
    assert max(sizes) < 1_000_000
    assert len(sizes) == 100_000 // CHUNK + 2


def test_memory_is_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "BLOCK", 1000)
    peaks = []
    for count in (2000, 8000):
        tracemalloc.start()
        write_preview(open_storage(tmp_path / str(count)), make_rows(count), {})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_page_names_its_elements():
    """Every id that the script looks up is an element of the page, and the page loads nothing from elsewhere."""
    page = preview.TEMPLATE.read_text(encoding="utf-8")
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    assert set(re.findall(r'\$\("(\w+)"\)', page)) <= ids
    assert set(re.findall(r"url\(#([\w-]+)\)", page)) <= ids
    assert not re.findall(r'(?:src|href)="|https?://', page.replace("http://www.w3.org", ""))


def test_command(blobs, tmp_path, capsys):
    import shutil

    path = tmp_path / "data"
    shutil.copytree(blobs.path, path)
    before = {file.name: file.read_bytes() for file in [path / "index.html", *(path / "preview").iterdir()]}
    shutil.rmtree(path / "preview")
    assert main(["preview", str(path)]) == 0
    assert f"9 images in {path}/index.html" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in [path / "index.html", *(path / "preview").iterdir()]} == before
    assert main(["preview", str(tmp_path)]) == 2
    assert "is not a data set of gd-infer" in capsys.readouterr().err
