"""Every format of gd-dataset convert, read back by the reader its users use."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine.dataset.formats import FORMATS, WITHOUT_CLASSES, open_format
from grounded_diffusion.engine.dataset.formats.common import Classes, Settings, voc_palette, with_void
from grounded_diffusion.engine.dataset.formats.polygons import contours
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.runfile import MARKER
from grounded_diffusion.engine.dataset.shards import write_dataset
from grounded_diffusion.engine.dataset.storage.open import open_storage

CONVERTED = [name for name in FORMATS if name not in WITHOUT_CLASSES]


def test_reading_back_gives_the_samples(blobs):
    records = list(FolderDataset(blobs.path))
    assert [record.split for record in records] == ["train"] * 6 + ["val"] * 3
    for index, record in enumerate(records):
        sample, direct = blobs.sample(index), Record.from_sample(blobs.sample(index))
        for one in (record, direct):
            assert (one.id, one.prompt, one.seed, one.draw) == (f"{index:06d}", sample.prompt, 2**62, index)
            assert np.array_equal(one.image, sample.image)
            assert np.array_equal(one.labels, sample.labels)
            for thing in one.objects:
                assert thing.mask.dtype == np.bool_
                assert np.array_equal(thing.mask, sample.masks[thing.name])
                assert (thing.area, thing.box) == (sample.object(thing.name).area, sample.object(thing.name).box)


@pytest.mark.parametrize("format", CONVERTED)
def test_samples_and_files_give_the_same_bytes(blobs, tmp_path, format):
    """A run that writes a format itself, and one that is converted, differ in nothing."""
    converted, direct = blobs.convert(tmp_path / "converted", format, "--shard-size", 4), tmp_path / "direct"
    writer = open_format(format, Settings(Classes(blobs.names), 95))
    records = [Record.from_sample(blobs.sample(index), blobs.split(index)) for index in range(blobs.count)]
    write_dataset(open_storage(direct), writer, [(6, records[:6]), (3, records[6:])], writer.encode, 4)
    files = {p.relative_to(direct): p.read_bytes() for p in direct.rglob("*") if p.is_file()}
    files_converted = {p.relative_to(converted): p.read_bytes() for p in converted.rglob("*") if p.is_file()}
    marker = json.loads(files_converted[Path(MARKER)])
    assert (marker["format"], marker["samples"]) == (format, blobs.count)
    assert marker["classes"] == {name: k for k, name in enumerate(blobs.names, 1)}
    assert files == files_converted


def test_voc(blobs, tmp_path):
    out = blobs.convert(tmp_path / "voc", "voc") / "VOCdevkit" / "VOC2012"
    lists = {p.stem: p.read_text().split() for p in (out / "ImageSets" / "Segmentation").iterdir()}
    ids = [f"{index:06d}" for index in range(blobs.count)]
    assert lists == {"train": ids[:6], "val": ids[6:], "trainval": ids}
    for index, id in enumerate(ids):
        classes, objects = (Image.open(out / f"Segmentation{kind}" / f"{id}.png") for kind in ("Class", "Object"))
        assert classes.mode == objects.mode == "P"
        assert tuple(classes.getpalette()[:12]) == voc_palette()[:12]
        assert np.array_equal(np.asarray(classes), blobs.class_map(index))
        assert np.array_equal(np.asarray(objects), blobs.sample(index).labels)
        assert Image.open(out / "JPEGImages" / f"{id}.jpg").size == (blobs.width, blobs.height)
    assert (out / "labelmap.txt").read_text().splitlines()[1:] == [
        "background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::", "tv monitor:128,128,0::",
    ]  # fmt: skip


def test_vocs_own_ids(blobs, tmp_path):
    out = blobs.convert(tmp_path / "voc", "voc", "--names", "voc")
    mask = np.asarray(Image.open(out / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "000001.png"))
    assert set(np.unique(mask)) <= {0, 12, 20}
    assert 12 in mask


def test_names_in_the_order_of_a_file(blobs, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("bird\nTVmonitor\ncat\ndog\n")
    out = blobs.convert(tmp_path / "mmseg", "mmseg", "--names", names)
    table = np.array([0, 3, 4, 2], np.uint8)  # cat, dog, tv monitor
    mask = np.asarray(Image.open(out / "ann_dir" / "train" / "000001.png"))
    assert np.array_equal(mask, table[blobs.class_map(1)])


def test_void_border():
    labels = np.zeros((7, 9), np.uint8)
    labels[:, 5:] = 1
    assert np.array_equal(with_void(labels, 0), labels)
    for width in (1, 2):
        void = np.zeros(9, bool)
        void[5 - width : 5 + width] = True
        expected = np.where(void, 255, labels)
        assert np.array_equal(with_void(labels, width), expected)


def test_void_border_in_voc(blobs, tmp_path):
    out = blobs.convert(tmp_path / "voc", "voc", "--void-border", 1) / "VOCdevkit" / "VOC2012"
    mask = np.asarray(Image.open(out / "SegmentationClass" / "000000.png"))
    assert (mask == 255).any()
    assert np.array_equal(mask[mask != 255], blobs.class_map(0)[mask != 255])


def test_mmseg(blobs, tmp_path):
    out = blobs.convert(tmp_path / "mmseg", "mmseg", "--png")
    for index in range(blobs.count):
        mask = Image.open(out / "ann_dir" / blobs.split(index) / f"{index:06d}.png")
        assert np.array_equal(np.asarray(mask), blobs.class_map(index))
        assert np.asarray(mask).dtype == np.uint8
        image = Image.open(out / "img_dir" / blobs.split(index) / f"{index:06d}.png")
        assert np.array_equal(np.asarray(image), blobs.sample(index).image)
    assert (out / "classes.txt").read_text().splitlines() == ["background", *blobs.names]


def test_webdataset(blobs, tmp_path):
    import webdataset

    out = blobs.convert(tmp_path / "one", "webdataset", "--png", "--shard-size", 4)
    again = blobs.convert(tmp_path / "two", "webdataset", "--png", "--shard-size", 4)
    tars = sorted(p.name for p in out.glob("*.tar"))
    assert tars == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in tars)
    with tarfile.open(out / tars[0]) as tar:
        assert tar.getnames()[:4] == ["000000.png", "000000.seg.png", "000000.json", "000000.txt"]
    samples = list(webdataset.WebDataset([str(out / name) for name in tars], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:06d}" for index in range(blobs.count)]
    decoded = webdataset.WebDataset([str(out / name) for name in tars], shardshuffle=False).decode("pil")
    for index, sample in enumerate(decoded):
        expected = blobs.sample(index)
        assert np.array_equal(np.asarray(sample["png"]), expected.image)
        assert sample["txt"] == expected.prompt
        raw = samples[index]["seg.png"]
        (tmp_path / "mask.png").write_bytes(raw)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), blobs.class_map(index))
        assert sample["json"]["seed"] == 2**62
        assert [thing["name"] for thing in sample["json"]["objects"]] == list(expected.names)


def check_hugging_face(blobs, data):
    """Splits, columns and pixels as `datasets` gives them."""
    assert {name: len(part) for name, part in data.items()} == {"train": 6, "validation": 3}
    for part in data.values():
        for row in part:
            expected = blobs.sample(int(row["id"]))
            assert row["prompt"] == expected.prompt
            assert row["seed"] == 2**62
            assert row["width"] == blobs.width
            assert np.array_equal(np.asarray(row["image"]), expected.image)
            assert np.array_equal(np.asarray(row["mask"]), blobs.class_map(int(row["id"])))
            assert [thing["name"] for thing in row["objects"]] == list(expected.names)
            assert [tuple(thing["box"]) for thing in row["objects"]] == [found.box for found in expected.objects]


@pytest.mark.parametrize("format", ["hf-imagefolder", "hf-parquet"])
def test_hugging_face(blobs, tmp_path, format):
    import datasets

    out = blobs.convert(tmp_path / "hf", format, "--png", "--shard-size", 4)
    cache = str(tmp_path / "cache")
    check_hugging_face(blobs, datasets.load_dataset(str(out), cache_dir=cache))
    if format == "hf-imagefolder":
        check_hugging_face(blobs, datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=cache))
    else:
        names = sorted(file.name for file in (out / "data").iterdir())
        assert names == [
            "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet",
        ]  # fmt: skip


def test_yolo(blobs, tmp_path, capsys):
    import supervision
    import yaml

    out = blobs.convert(tmp_path / "yolo", "yolo-seg")
    assert "YOLO's polygons filled" in capsys.readouterr().err
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "train": "images/train", "val": "images/val", "names": dict(enumerate(blobs.names)),
    }  # fmt: skip
    for index in range(blobs.count):
        sample, outer = blobs.sample(index), {}
        lines = (out / "labels" / blobs.split(index) / f"{index:06d}.txt").read_text().splitlines()
        for line in lines:
            category, *values = line.split()
            points = np.array(values, float).reshape(-1, 2)
            assert points.min() >= 0
            assert points.max() <= 1
            corners = [tuple(point) for point in np.rint(points * [blobs.width, blobs.height]).astype(int).tolist()]
            outer.setdefault(blobs.names[int(category)], []).append(corners)
        assert outer == {n: contours(sample.masks[n])[0] for n in sample.names if sample.object(n).area}
    data = supervision.DetectionDataset.from_yolo(
        str(out / "images" / "train"), str(out / "labels" / "train"), str(out / "data.yaml"), force_masks=True
    )
    assert data.classes == list(blobs.names)
    assert len(data) == 6
    assert all(len(detections) for _, _, detections in data)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_void_border_is_every_pixel_near_another_label(width):
    rng = np.random.default_rng(width)
    for _ in range(20):
        labels = rng.integers(0, 3, rng.integers(1, 12, 2)).astype(np.uint8).repeat(2, 0).repeat(3, 1)
        void = with_void(labels, width) == 255
        for y, x in np.ndindex(labels.shape):
            window = labels[max(0, y - width) : y + width + 1, max(0, x - width) : x + width + 1]
            assert void[y, x] == (window.min() != window.max())


def test_a_real_run_from_prompts_to_coco(tiny_bundle, tmp_path, capsys):
    from pycocotools.coco import COCO

    from grounded_diffusion.engine.cli import dataset as dataset_cli
    from grounded_diffusion.engine.cli import infer as cli
    from grounded_diffusion.engine.cli import prompts as prompts_cli

    (tmp_path / "names.txt").write_text("dog\ncat\nunicorn\n")
    (tmp_path / "pairs.txt").write_text("dog, cat\n")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lists = ["--names", str(tmp_path / "names.txt"), "--pairs", str(tmp_path / "pairs.txt")]
    assert prompts_cli.main([*lists, "--per-name", "1", "--per-pair", "2", "--out", str(prompts)]) == 0
    run = ["--prompts", str(prompts), "--model", str(tiny_bundle), "--out", str(out), "--steps", "2"]
    assert cli.main(run) == 0
    assert dataset_cli.main(["verify", str(out)]) == 0
    assert "5 records, no problems" in capsys.readouterr().out
    assert dataset_cli.main(["convert", str(out), "--format", "coco", "--out", str(tmp_path / "coco")]) == 0
    coco = COCO(tmp_path / "coco" / "annotations" / "instances_train.json")
    masks = {
        (record.id, thing.name): thing.mask for record in FolderDataset(out) for thing in record.objects if thing.area
    }
    assert len(coco.getImgIds()) == 5
    assert len(coco.getAnnIds()) == len(masks) > 0
    for annotation in coco.loadAnns(coco.getAnnIds()):
        id = coco.imgs[annotation["image_id"]]["file_name"].split(".")[0]
        name = coco.cats[annotation["category_id"]]["name"]
        assert np.array_equal(coco.annToMask(annotation), masks[id, name])
