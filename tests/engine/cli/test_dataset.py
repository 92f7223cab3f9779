"""gd-dataset: stats, split, merge, and what convert refuses."""

import json
import shutil
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.errors import UsageError


def run(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line of a refusal."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("gd-dataset: ")
    return error


def edit_metadata(data, line, change):
    file = data / "metadata.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    change(rows[line])
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_stats(blobs, data, capsys):
    assert run("stats", data, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    samples = [blobs.sample(index) for index in range(blobs.count)]
    assert (result["images"], result["objects"]) == (9, sum(len(sample.objects) for sample in samples))
    for name in blobs.names:
        areas = [sample.object(name).area / (40 * 56) for sample in samples if name in sample.names]
        seen, entry = [area for area in areas if area], result["classes"][name]
        assert (entry["images"], entry["empty"]) == (len(areas), len(areas) - len(seen))
        assert entry["mean_area"] == pytest.approx(np.mean(seen))
        assert entry["mean_score"] == 0.75
        assert (entry["min_area"], entry["max_area"]) == (min(seen), max(seen))
    pair = next(pair for pair in result["overlaps"] if pair["classes"] == ["cat", "dog"])
    both = [(sample.masks["cat"], sample.masks["dog"]) for sample in samples[::2]]
    ious = [(a & b).sum() / (a | b).sum() for a, b in both]
    assert (pair["images"], pair["overlapping"]) == (5, 5)
    assert pair["mean_iou"] == pytest.approx(np.mean(ious))
    assert run("stats", data) == 0
    assert sum(result["classes"]["cat"]["areas"]) == sum(
        1 for sample in samples if sample.masks.get("cat", np.False_).any()
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("9 images")
    assert lines[3].startswith("cat ")
    assert "tv monitor" in lines[5]


def test_stats_as_a_picture(data, tmp_path, capsys):
    file = tmp_path / "stats.svg"
    assert run("stats", data, "--json", "--plot", file) == 0
    result = json.loads(capsys.readouterr().out)
    rectangles = ElementTree.parse(file).getroot().findall("{*}rect")
    told = [rectangle.findtext("{*}title") for rectangle in rectangles[1:]]
    cat = result["classes"]["cat"]
    assert f"{cat['images']} images" in told
    assert f"{cat['images'] - cat['empty']} with a mask" in told
    assert all(f"{k * 10}-{k * 10 + 10}%: {count}" in told for k, count in enumerate(cat["areas"]))
    assert max(float(rectangle.get("width")) for rectangle in rectangles[1:]) == 220
    assert "cannot write" in refused(capsys, "stats", data, "--plot", tmp_path / "nowhere" / "stats.svg")


def test_split_is_the_same_on_every_machine(data, capsys):
    assert run("split", data, "--val", 0.5) == 0
    train, val = ((data / f"{name}.txt").read_text().split() for name in ("train", "val"))
    assert val == ["000001", "000003", "000004", "000006"]  # half of each class
    assert sorted(train + val) == [f"{index:06d}" for index in range(9)]
    assert {record.id: record.split for record in FolderDataset(data)} == {
        **dict.fromkeys(train, "train"), **dict.fromkeys(val, "val"),
    }  # fmt: skip


def test_split_replaces_lists_that_no_longer_fit(data, capsys):
    (data / "val.txt").write_text("000000\n")
    assert "gd-dataset split" in refused(capsys, "stats", data)
    assert run("split", data, "--val", 0.5) == 0
    assert run("verify", data) == 0


@pytest.mark.parametrize(("share", "said"), [(0, "between 0 and 1"), (1, "between 0 and 1"), (1e-9, "would be empty")])
def test_split_refuses(data, capsys, share, said):
    before = (data / "val.txt").read_text()
    assert said in refused(capsys, "split", data, "--val", share)
    assert (data / "val.txt").read_text() == before


def test_merge(blobs, tmp_path, capsys):
    first = blobs.write(tmp_path / "a", [0, 1, 2])
    second = blobs.write(tmp_path / "b", [5, 7])
    out = tmp_path / "c"
    assert run("merge", first, second, "--out", out) == 0
    assert run("verify", out) == 0
    merged = list(FolderDataset(out))
    assert [record.id for record in merged] == [f"{index:06d}" for index in range(5)]
    for record, index in zip(merged, [0, 1, 2, 5, 7], strict=True):
        sample = blobs.sample(index)
        assert (record.prompt, record.draw) == (sample.prompt, index)
        assert np.array_equal(record.image, sample.image)
        assert all(np.array_equal(thing.mask, sample.masks[thing.name]) for thing in record.objects)
    assert json.loads((out / "run.json").read_text())["settings"]["merged"] == [{"seed": 7}] * 2
    assert json.loads((out / "shards/000000.json").read_text())["accepted"] == 5
    assert "000004" in (out / "preview/000000.js").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_merge_refuses_the_same_picture_twice(blobs, tmp_path, capsys):
    first, second = blobs.write(tmp_path / "a", [0, 1]), blobs.write(tmp_path / "b", [1])
    assert "is the same picture as" in refused(capsys, "merge", first, second, "--out", tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_merge_refuses_damaged_sources(blobs, data, tmp_path, capsys):
    (data / "images/000/000000.png").unlink()
    other = blobs.write(tmp_path / "b", [1])
    assert "000000.png is missing" in refused(capsys, "merge", other, data, "--out", tmp_path / "c")


def test_merge_of_one(data, tmp_path, capsys):
    assert "two or more" in refused(capsys, "merge", data, "--out", tmp_path / "c")


CONVERT = [
    (["--format", "pascal"], "invalid choice: 'pascal'"),
    (["--format", "coco", "--jpeg-quality", 0], "--jpeg-quality must be from 1 to 100"),
    (["--format", "coco", "--jpeg-quality", 90, "--png"], "not allowed with"),
    (["--format", "voc", "--png"], "leave --png out"),
    (["--format", "mmseg", "--void-border", -1], "--void-border must be from 0"),
    (["--format", "coco", "--void-border", 1], "coco has no void pixels"),
    (["--format", "voc", "--polygons"], "--polygons is for coco"),
    (["--format", "webdataset", "--shard-size", 0], "--shard-size must be from 1"),
    (["--format", "voc", "--names", "nowhere"], "cannot read nowhere"),
]


@pytest.mark.parametrize(("options", "said"), CONVERT)
def test_convert_refuses(data, tmp_path, capsys, options, said):
    assert said in refused(capsys, "convert", data, "--out", tmp_path / "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("cat\ndog\n", "'tv monitor' is not among the 2 class names"),
        ("cat\ndog\ntv monitor\ntvmonitor\n", "differ only in case or spaces"),
        ("cat\ndog\ntv monitor\n" + "".join(f"c{k}\n" for k in range(252)), "255 classes, at most 254 fit"),
    ],
)
def test_convert_refuses_names(data, tmp_path, capsys, names, said):
    (tmp_path / "names").write_text(names)
    out = tmp_path / "out"
    assert said in refused(capsys, "convert", data, "--format", "voc", "--out", out, "--names", tmp_path / "names")
    assert not out.exists()


def test_two_objects_of_one_class(data, tmp_path, capsys):
    edit_metadata(data, 1, lambda row: row["objects"][0].update(name="tvmonitor"))
    (tmp_path / "names").write_text("cat\ndog\ntv monitor\n")
    arguments = ("convert", data, "--format", "coco", "--out", tmp_path / "out", "--names", tmp_path / "names")
    assert "000001" in (said := refused(capsys, *arguments))
    assert "two objects of one class" in said


@pytest.mark.parametrize("format", ["voc", "coco", "webdataset", "hf-parquet"])
def test_a_failure_leaves_nothing(data, tmp_path, capsys, format):
    (data / "images/000/000007.png").write_bytes(b"broken")
    said = refused(capsys, "convert", data, "--format", format, "--out", tmp_path / "deep" / "out")
    assert "images/000/000007.png cannot be read" in said
    assert not list((tmp_path / "deep").iterdir())


def test_a_failure_keeps_what_was_there(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("convert", data, "--format", "coco", "--out", out) == 0
    (data / "images/000/000007.png").write_bytes(b"broken")
    before = sorted(out.rglob("*"))
    refused(capsys, "convert", data, "--format", "voc", "--out", out, "--overwrite")
    assert sorted(out.rglob("*")) == before
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out"}


def test_overwrite_replaces_only_our_own(data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    convert = ("convert", data, "--out", out, "--format")
    assert run(*convert, "coco") == 0  # an empty folder is fine
    assert "--overwrite replaces it" in refused(capsys, *convert, "voc")
    assert run(*convert, "voc", "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["VOCdevkit", "gd-dataset.json", "shards"]
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    said = refused(capsys, "convert", data, "--format", "voc", "--out", foreign, "--overwrite")
    assert "not written by this command" in said
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_out_is_a_file_or_lies_in_the_source(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "convert", data, "--format", "voc", "--out", tmp_path / "file")
    for out in (data, data / "voc", tmp_path):
        assert "lie within each other" in refused(capsys, "convert", data, "--format", "voc", "--out", out)


def test_not_a_data_set(tmp_path, capsys):
    assert "is not a data set of gd-infer" in refused(capsys, "stats", tmp_path)
    (tmp_path / "shards").mkdir()
    assert "the same gd-infer command finishes it" in refused(capsys, "stats", tmp_path)
    assert "has no finished shard" in refused(capsys, "verify", tmp_path)
    assert "there is no folder" in refused(capsys, "verify", tmp_path / "nowhere")
    assert "COMMAND" in refused(capsys)


LINES = [
    (lambda row: row.pop("seed"), "metadata.jsonl:5: seed is missing"),
    (lambda row: row.update(id="000003", index=3), "metadata.jsonl:5: the id 000003 does not come after 000003"),
    (lambda row: row.update(id="../x"), "metadata.jsonl:5: the id '../x' does not belong to index 4"),
    (lambda row: row.update(mask="/etc/passwd"), "metadata.jsonl:5: the file /etc/passwd lies outside the data set"),
    (
        lambda row: row["objects"][0].update(box=[1, 2]),
        "jsonl:5: objects[0].box must be a list of length 4, not 2",
    ),
]


@pytest.mark.parametrize(("change", "said"), LINES)
def test_a_damaged_line_is_named(data, capsys, change, said):
    edit_metadata(data, 4, change)
    assert said in refused(capsys, "stats", data)


def test_parquet_without_pyarrow(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # makes the import fail, as where it is not installed
    said = refused(capsys, "convert", data, "--format", "hf-parquet", "--out", tmp_path / "out")
    assert "grounded-diffusion[parquet]" in said
    assert not (tmp_path / "out").exists()


def test_missing_mask_is_an_error_of_the_library(data):
    record = next(iter(FolderDataset(data)))
    shutil.rmtree(data / "objects")
    with pytest.raises(UsageError, match="is missing"):
        _ = record.objects[0].mask
