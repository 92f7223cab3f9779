"""gd-infer --val: train and validation in one go, in every format."""

import json
import tarfile
from collections import Counter

import pytest
from helpers import null_backend as null

from grounded_diffusion.engine.cli import dataset
from grounded_diffusion.engine.dataset.formats import FORMATS, WITHOUT_SPLITS
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.verify import verify

SPLIT = [name for name in FORMATS if name not in WITHOUT_SPLITS]
IDS = {f"{index:06d}" for index in range(60)}
TABLES = {"coco": "annotations/instances_{}.json", "coco-panoptic": "annotations/panoptic_{}.json"}


@pytest.fixture(scope="module")
def make(tiny_bundle, tmp_path_factory):
    """gd-infer of 60 samples of two classes into a folder, a fifth of which is val."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"prompt": f"the {name}", "objects": [name], "count": 30} for name in ("dog", "cat")]
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ["--model", tiny_bundle, "--prompts", prompts, "--steps", "2", "--sampler", "ddim", "--batch", "4"]
    return lambda format, out, *more: null.main(
        [*options, "--shard-size", "8", "--val", "0.2", "--format", format, "--out", out, *more]
    )


@pytest.fixture(scope="module")
def folder(make, tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "out"
    assert make("folder", out) == 0
    return out


@pytest.fixture(scope="module")
def val(folder):
    """Ids that are kept for validation."""
    return set((folder / "val.txt").read_text().split())


def ids_of(out, format, split):
    """Ids of a split, as readers of the format find them."""
    there = {"train": "train", "val": "validation"}[split] if format.startswith("hf-") else split
    if format == "folder":
        return (out / f"{split}.txt").read_text().split()
    if format == "voc":
        return (out / f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt").read_text().split()
    if format in TABLES:
        table = json.loads((out / TABLES[format].format(split)).read_text())
        listed = [image["file_name"].partition(".")[0] for image in table["images"]]
        assert sorted(listed) == sorted(path.stem for path in (out / "images" / split).iterdir())
        return listed
    if format == "hf-imagefolder":
        return [json.loads(line)["id"] for line in (out / there / "metadata.jsonl").read_text().splitlines()]
    if format == "hf-parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        files = sorted((out / "data").glob(f"{there}-*"))
        return [id for file in files for id in parquet.read_table(file)["id"].to_pylist()]
    if format == "webdataset":
        names = []
        for file in sorted(out.glob(f"{split}-*.tar")):
            with tarfile.open(file) as tar:
                names += tar.getnames()
        return [name.partition(".")[0] for name in names if name.endswith(".json")]
    images = {"mmseg": "img_dir", "yolo": "images", "yolo-seg": "images"}[format]
    return [path.stem for path in (out / images / split).iterdir()]


def test_each_class_has_its_share(folder, val):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert Counter(row["objects"][0]["name"] for row in rows if row["id"] in val) == {"dog": 6, "cat": 6}


@pytest.mark.parametrize("format", SPLIT)
def test_every_format_has_the_same_split(make, tmp_path, val, format):
    assert make(format, tmp_path / "out") == 0
    assert sorted(ids_of(tmp_path / "out", format, "val")) == sorted(val)
    assert sorted(ids_of(tmp_path / "out", format, "train")) == sorted(IDS - val)
    assert list(verify(tmp_path / "out")) == []


def test_a_conversion_has_the_split_too(make, folder, tmp_path):
    """And the very images and labels of a run in that format."""
    assert make("mmseg", tmp_path / "made") == 0
    assert dataset.main(["convert", str(folder), "--format", "mmseg", "--out", str(tmp_path / "converted")]) == 0
    images = lambda out: {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("ann_dir/*/*")}
    assert images(tmp_path / "made") == images(tmp_path / "converted")
    assert len(images(tmp_path / "made")) == len(IDS)


def test_the_split_of_the_records_is_no_part_of_the_metadata(folder):
    assert "split" not in json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])


def test_split_of_what_was_made_agrees(folder, val):
    """gd-dataset split follows the same rule, where no sample is lost."""
    assert dataset.main(["split", str(folder), "--val", "0.2"]) == 0
    assert {record.id for record in FolderDataset(folder) if record.split == "val"} == val
    assert list(verify(folder)) == []


def test_a_share_of_one_worker_has_the_split(make, tmp_path, val):
    assert make("mmseg", tmp_path / "out", "--shard", "1/2") == 0
    assert make("mmseg", tmp_path / "out", "--shard", "0/2") == 0
    assert sorted(ids_of(tmp_path / "out", "mmseg", "val")) == sorted(val)


def test_another_share_is_refused_by_name(make, folder, capsys):
    assert make("folder", folder, "--val", "0.3") == 2
    assert "val was 0.2, now 0.3" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["0", "1", "1.5", "nan"])
def test_what_is_no_share(make, tmp_path, capsys, share):
    assert make("folder", tmp_path / "out", "--val", share) == 2
    said = capsys.readouterr().err
    assert "--val" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("format", WITHOUT_SPLITS)
def test_formats_without_a_split(make, tmp_path, capsys, format):
    assert make(format, tmp_path / "out") == 2
    assert f"{format} has no split into train and val; leave --val out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_split_says_which_formats_it_takes(make, tmp_path, capsys):
    assert make("coco", tmp_path / "out") == 0
    assert dataset.main(["split", str(tmp_path / "out"), "--val", "0.2"]) == 2
    assert "has the format coco, and only folder is read again; gd-infer --val makes" in capsys.readouterr().err
