"""gd-dataset verify: every kind of damage is named."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.reader import FolderDataset


def run(*arguments):
    return main([str(argument) for argument in arguments])


def problems(capsys, data):
    """Lines that verify prints about a damaged data set."""
    assert run("verify", data) == 1
    return capsys.readouterr().out.splitlines()


def edit(data, index, change):
    """Change a sample's record in place, in its shard of four and in the metadata."""
    file = data / "shards" / f"{index // 4:06d}.json"
    shard = json.loads(file.read_text())
    change(shard["rows"][index % 4])
    file.write_text(json.dumps(shard))
    edit_metadata(data, index, change)


def edit_metadata(data, line, change):
    file = data / "metadata.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    change(rows[line])
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def edit_shard(data, shard, change):
    file = data / "shards" / f"{shard:06d}.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def test_verify_finds_nothing_in_a_sound_data_set(data, capsys):
    assert run("verify", data) == 0
    assert "9 records, no problems" in capsys.readouterr().out


def resave(file):
    """The same pixels in other bytes."""
    with Image.open(file) as image:
        image.load()
    image.save(file, compress_level=9)


DAMAGES = {
    "missing image": (lambda d: (d / "images/000/000002.png").unlink(), "images/000/000002.png is missing"),
    "other bytes": (lambda d: resave(d / "images/000/000002.png"), "images/000/000002.png: has changed since"),
    "truncated mask": (
        lambda d: (d / "masks/000/000002.png").write_bytes((d / "masks/000/000002.png").read_bytes()[:70]),
        "masks/000/000002.png cannot be read",
    ),
    "empty file": (lambda d: (d / "images/000/000003.png").write_bytes(b""), "images/000/000003.png cannot be read"),
    "other size": (lambda d: Image.new("RGB", (8, 8)).save(d / "images/000/000001.png"), "has 8x8 pixels instead of"),
    "other mode": (lambda d: Image.new("L", (56, 40)).save(d / "images/000/000001.png"), "has mode L instead of RGB"),
    "other area": (lambda d: edit(d, 1, lambda r: r["objects"][0].update(area=5)), "000001 says 5"),
    "other box": (lambda d: edit(d, 1, lambda r: r["objects"][0].update(box=[0, 0, 1, 1])), "says [0, 0, 1, 1]"),
    "id and index": (lambda d: edit(d, 4, lambda r: r.update(index=40)), "the id '000004' does not belong to index 40"),
    "id twice": (lambda d: edit(d, 4, lambda r: r.update(id="000003", index=3)), "the id 000003 occurs more than once"),
    "not its ids": (lambda d: edit(d, 4, lambda r: r.update(id="000009", index=9)), "its samples are not 4 to 7, each"),
    "file twice": (lambda d: edit(d, 4, lambda r: r.update(image="images/000/000003.png")), "has no SHA-256 of images"),
    "file outside": (lambda d: edit(d, 4, lambda r: r.update(image="../x.png")), "lies outside the data set"),
    "field missing": (lambda d: edit(d, 0, lambda r: r.pop("seed")), "000000.json: seed is missing (sample 000000)"),
    "labels": (lambda d: edit(d, 0, lambda r: r["objects"][0].update(label=2)), "000000.json: the labels"),
    "edited metadata": (
        lambda d: edit_metadata(d, 4, lambda r: r.update(prompt="x")), "metadata.jsonl: has changed since",
    ),
    "no metadata": (lambda d: (d / "metadata.jsonl").unlink(), "metadata.jsonl is missing"),
    "not finished": (lambda d: (d / "shards/finish.json").unlink(), "finish.json: is missing; the run is not finished"),
    "damaged finish": (lambda d: (d / "shards/finish.json").write_text("[]"), "shards/finish.json: is damaged"),
    "foreign file": (lambda d: (d / "images/000/old.png").write_bytes(b"x"), "old.png: belongs to no record"),
    "foreign folder": (
        lambda d: shutil.copytree(d / "masks/000", d / "masks/001"), "masks/001/000003.png: belongs to no record",
    ),
    "no settings": (lambda d: (d / "run.json").write_text("[]"), "run.json: missing or damaged"),
    "missing shard": (lambda d: (d / "shards/000001.json").unlink(), "000001.json: is missing; the same gd-infer"),
    "damaged shard": (lambda d: (d / "shards/000001.json").write_text("{"), "000001.json is damaged; remove it"),
    "lost sample": (lambda d: edit_shard(d, 1, lambda s: s.update(samples=5)), "000001.json is damaged; remove it"),
    "split": (lambda d: (d / "val.txt").write_text("000000\n"), "val.txt: 000000 is listed twice"),
    "split short": (lambda d: (d / "val.txt").write_text("000006\n"), "do not fit the records (000007)"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_what_is_damaged(data, capsys, damage):
    harm, said = DAMAGES[damage]
    harm(data)
    assert any(said in line for line in problems(capsys, data))


def test_verify_compares_label_map_and_masks(data, capsys):
    file = data / "masks/000/000001.png"
    labels = np.asarray(Image.open(file)).copy()
    y, x = (int(axis[0]) for axis in np.nonzero(labels))
    labels[y, x] = 0
    Image.fromarray(labels).save(file)
    assert problems(capsys, data) == [
        f"{file}: has changed since it was written (SHA-256 differs)",
        f"{file}: 1 pixels of the objects' masks are background",
    ]
    labels[:] = 7
    Image.fromarray(labels).save(file)
    assert any("has the label 7, the record has 2 objects" in line for line in problems(capsys, data))
    labels[:] = 1
    Image.fromarray(labels).save(file)
    assert any("lie outside objects/000/000001_0_dog.png" in line for line in problems(capsys, data))


def test_verify_shows_twenty_problems(data, capsys):
    files = sum(1 + len(record.objects) for record in FolderDataset(data))
    shutil.rmtree(data / "objects")
    shutil.rmtree(data / "images")
    lines = problems(capsys, data)
    assert len(lines) == 21
    assert lines[-1] == f"and {files - 20} more"


@pytest.mark.parametrize("format", ["voc", "coco-panoptic", "webdataset", "hf-parquet", "yolo-seg"])
def test_verify_of_what_was_converted(blobs, tmp_path, capsys, format):
    out = blobs.convert(tmp_path / "out", format, "--shard-size", 4)
    assert run("verify", out) == 0
    assert "9 records, no problems" in capsys.readouterr().out
    record = json.loads((out / "shards/000001.json").read_text())
    file = out / next(iter(record["files"]))
    file.write_bytes(file.read_bytes()[:-1])
    assert problems(capsys, out) == [f"{file}: has changed since it was written (SHA-256 differs)"]
    file.unlink()
    assert problems(capsys, out) == [f"{file} is missing"]
    listed = json.loads((out / "shards/finish.json").read_text())["files"]
    for name in listed:
        (out / name).write_bytes((out / name).read_bytes() + b" ")
    assert sum("has changed since" in line for line in problems(capsys, out)) == len(listed)
