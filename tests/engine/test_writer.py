"""The folder writer and the contact sheet: layout, palette, atomicity, resuming, refusals."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine.outline import outline, reduce_mask
from grounded_diffusion.engine.pipeline import Sample
from grounded_diffusion.engine.writer import FolderWriter, slug, voc_palette
from grounded_diffusion.errors import UsageError

SETTINGS = {"model": "0" * 64, "sampler": "ddim", "steps": 25, "guidance_scale": 7.5, "seed": 7, "size": [20, 24]}


def make_sample(index, objects=("dog", "traffic light")):
    rng = np.random.default_rng(index)
    masks = {name: rng.random((20, 24)) > 0.5 for name in objects}
    labels = np.zeros((20, 24), np.uint8)
    for k, name in enumerate(objects):
        labels[masks[name]] = k + 1
    return Sample(
        index=index, prompt=f'a "dog" & </script><b> {index}', objects=tuple(objects), seed=7, draw=index,
        image=rng.integers(0, 256, (20, 24, 3), np.uint8), labels=labels, masks=masks,
        areas={name: int(mask.sum()) for name, mask in masks.items()},
        boxes=dict.fromkeys(objects, (0, 0, 24, 20)), scores=dict.fromkeys(objects, 0.75),
        capture_timestep=1, mask_logits=np.zeros((2, 5, 6), np.float32), latents=np.zeros((4, 5, 6), np.float32),
    )  # fmt: skip


def write(out, indices, settings=SETTINGS, **options):
    writer = FolderWriter(out, **options)
    done = writer.start(settings)
    try:
        for index in indices:
            if index not in done:
                writer.put(make_sample(index))
    finally:
        writer.close()
    return done


def read_records(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_layout_and_contents(tmp_path):
    out = tmp_path / "new" / "out"
    write(out, range(12))
    records = read_records(out)
    assert [record["index"] for record in records] == list(range(12))
    for record in records:
        sample = make_sample(record["index"])
        assert np.array_equal(np.asarray(Image.open(out / record["image"])), sample.image)
        labels = Image.open(out / record["mask"])
        assert labels.mode == "P" and np.array_equal(np.asarray(labels), sample.labels)
        assert labels.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        for thing in record["objects"]:
            mask = np.asarray(Image.open(out / thing["mask"]))
            assert np.array_equal(mask, sample.masks[thing["name"]]) and mask.sum() == thing["area"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["images", "masks", "objects", "index.html", "metadata.jsonl", "run.json"]
    )
    assert len(list(out.rglob("*.png"))) == 12 * 4 and not list(out.rglob("*.tmp"))


def test_the_page_holds_its_data_and_nothing_ends_it_early(tmp_path):
    write(tmp_path / "out", range(3))
    page = (tmp_path / "out" / "index.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    items = json.loads(data)
    assert [item["prompt"] for item in items] == [make_sample(i).prompt for i in range(3)]
    assert items[0]["grid"] == [24, 20] and items[0]["objects"][0][0] == "dog" and items[0]["objects"][0][3][0] == "M"
    assert "{{" not in page and not re.search(r'(src|href)="?https?:', page)
    assert "sampler ddim" in page and "guidance scale 7.5" in page


def draw(path, height, width):
    """Fill an outline by counting crossings to the left of each cell."""
    crossings = np.zeros((height, width + 1), int)
    for loop in path.split("M")[1:]:
        x, y = map(int, re.match(r"(\d+) (\d+)", loop).groups())
        start = (x, y)
        for kind, length in [(k, int(n)) for k, n in re.findall(r"([hv])(-?\d+)", loop)] + [("z", 0)]:
            if kind == "z":
                assert x == start[0] or y == start[1], "the closing line is straight"
                kind, length = ("h", start[0] - x) if y == start[1] else ("v", start[1] - y)
            if kind == "h":
                x += length
            else:
                crossings[min(y, y + length) : max(y, y + length), x] += 1
                y += length
    return np.cumsum(crossings, 1)[:, :width] % 2 == 1


def test_outlines_redraw_the_mask():
    rng = np.random.default_rng(0)
    for density in (0.02, 0.3, 0.5, 0.9, 1.0):
        mask = rng.random((17, 23)) < density
        assert np.array_equal(draw(outline(mask), 17, 23), mask)
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert np.array_equal(draw(outline(ring), 5, 5), ring)
    assert outline(np.zeros((4, 4), bool)) == ""


def test_large_masks_are_reduced():
    mask = np.zeros((512, 700), bool)
    mask[100:300, 200:400] = True
    small = reduce_mask(mask)
    assert max(small.shape) <= 128 and abs(small.mean() - mask.mean()) < 0.01


def test_palette_is_that_of_pascal_voc():
    palette = np.reshape(voc_palette(), (256, 3)).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15] == [192, 128, 128] and palette[20] == [0, 64, 128] and palette[255] == [224, 224, 192]


@pytest.mark.parametrize("name", ["dog", "dining table", "ünïcorn", "漢" * 64, "..", "--"])
def test_slugs_are_short_file_names(name):
    assert 1 <= len(slug(name).encode()) <= 160 and re.fullmatch(r"[\w-]+", slug(name))


def test_resume_finishes_what_is_missing(tmp_path):
    out = tmp_path / "out"
    write(out, range(4))
    before = {path: path.stat().st_mtime_ns for path in out.glob("images/*.png")}
    assert write(out, range(6), resume=True) == {0, 1, 2, 3}
    assert len(read_records(out)) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    items = re.findall(r'"id":"\d+"', (out / "index.html").read_text())
    assert len(items) == 6


def test_resume_after_a_kill(tmp_path):
    out = tmp_path / "out"
    writer = FolderWriter(out)
    writer.start(SETTINGS)
    for index in range(5):
        writer.put(make_sample(index))
    writer._pool.shutdown(wait=True)  # and then the process is gone: no close
    with (out / "metadata.jsonl.part").open("a") as journal:
        journal.write('{"id": "000005", "index": 5, "prom')
    (out / "images" / "000006.png.tmp").write_bytes(b"half")
    (out / "objects" / "000002_0_dog.png").unlink()
    assert not (out / "metadata.jsonl").exists()
    assert write(out, range(6), resume=True) == {0, 1, 3, 4}
    assert [record["index"] for record in read_records(out)] == list(range(6))
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.part"))
    assert (out / "objects" / "000002_0_dog.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "steps was 25, now 20"),
        ({"model": "1" * 64}, "model was 000000000000, now 111111111111"),
        ({"size": [64, 64]}, r"size was \[20, 24\], now \[64, 64\]"),
        ({"eta": 1}, "eta was not set, now 1"),
    ],
)
def test_resume_refuses_a_changed_run_by_name(tmp_path, change, message):
    write(tmp_path / "out", range(2))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        write(tmp_path / "out", range(2), SETTINGS | change, resume=True)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_resume_of_a_damaged_run(tmp_path):
    write(tmp_path / "out", range(2))
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        write(tmp_path / "out", range(2), resume=True)


def test_overwrite_leaves_nothing_of_the_earlier_run_and_all_else(tmp_path):
    out = tmp_path / "out"
    write(out, range(4))
    (out / "notes.txt").write_text("mine")
    write(out, range(1), SETTINGS | {"steps": 3}, overwrite=True)
    assert len(read_records(out)) == 1 and len(list(out.rglob("*.png"))) == 4
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_in_use_is_refused(tmp_path):
    write(tmp_path / "out", range(1))
    with pytest.raises(UsageError, match="not empty; --resume finishes what is missing, --overwrite starts again"):
        FolderWriter(tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_someone_else_is_never_touched(tmp_path, options):
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="was not written by gd-infer"):
        FolderWriter(tmp_path, **options)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        FolderWriter(tmp_path / "out")
    with pytest.raises(UsageError, match="cannot write"):
        FolderWriter(tmp_path / "out" / "below")


def test_not_writable():
    with pytest.raises(UsageError, match="cannot write"):
        FolderWriter("/proc/grounded").start(SETTINGS)  # refused to root, too


def test_a_run_that_makes_nothing_leaves_nothing(tmp_path):
    write(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_a_failure_in_a_thread_reaches_the_caller(tmp_path):
    writer = FolderWriter(tmp_path / "out")
    writer.start(SETTINGS)
    (tmp_path / "out" / "images" / "000001.png.tmp").mkdir()  # so that this file cannot be written
    writer.put(make_sample(0))
    writer.put(make_sample(1))
    with pytest.raises(UsageError, match=r"cannot write .*000001\.png"):
        writer.close()
    assert [record["index"] for record in read_records(tmp_path / "out")] == [0]
