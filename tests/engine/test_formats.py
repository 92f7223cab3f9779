"""Every format of gd-dataset convert, read back by the reader its users use."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine.dataset import FolderDataset, Record
from grounded_diffusion.engine.dataset_cli import main
from grounded_diffusion.engine.formats import WRITERS, open_writer
from grounded_diffusion.engine.formats.common import MARKER, Classes, Settings, mask_box, with_void
from grounded_diffusion.engine.formats.panoptic import class_colour, colour_id
from grounded_diffusion.engine.formats.polygons import contours, solid_polygons
from grounded_diffusion.engine.formats.rle import encode_rle
from grounded_diffusion.engine.pipeline import Sample
from grounded_diffusion.engine.writer import FolderWriter, voc_palette

NAMES = ["cat", "dog", "tv monitor"]
HEIGHT, WIDTH = 40, 56
COUNT = 9


def make_sample(index):
    """Blobs with holes and several pieces, which overlap; the third object is empty in every third sample."""
    rng = np.random.default_rng(index)
    names = NAMES[index % 2 :]
    masks = {}
    for k, name in enumerate(names):
        coarse = rng.random((HEIGHT // 4, WIDTH // 4)) > 0.55 + 0.1 * k
        masks[name] = coarse.repeat(4, 0).repeat(4, 1) ^ (rng.random((HEIGHT, WIDTH)) > 0.98)
        if name == "tv monitor" and index % 3 == 0:
            masks[name][:] = False
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for k, name in enumerate(names, 1):
        labels[masks[name]] = k
    return Sample(
        index=index, prompt=f"a photo of {' and '.join(names)}, n° {index}", objects=tuple(names), seed=2**62, draw=index,
        image=rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), labels=labels, masks=masks,
        areas={name: int(mask.sum()) for name, mask in masks.items()},
        boxes={name: tuple(mask_box(mask)) for name, mask in masks.items()},
        scores=dict.fromkeys(names, 0.75), capture_timestep=1.0,
        mask_logits=np.zeros((len(names), 5, 7), np.float32), latents=np.zeros((4, 5, 7), np.float32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder data set of nine samples, three of them in val."""
    path = tmp_path_factory.mktemp("source") / "data"
    writer = FolderWriter(path)
    writer.start({"seed": 7})
    for index in range(COUNT):
        writer.put(make_sample(index))
    writer.close()
    ids = [f"{index:06d}" for index in range(COUNT)]
    (path / "train.txt").write_text("\n".join(ids[:6]))
    (path / "val.txt").write_text("\n".join(ids[6:]))
    return path


def convert(source, out, format, *options):
    assert main(["convert", str(source), "--format", format, "--out", str(out), *map(str, options)]) == 0
    return out


def class_ids(index):
    """Class ids that a sample's label map must have."""
    sample = make_sample(index)
    ids = [0, *(NAMES.index(name) + 1 for name in sample.objects)]
    return np.array(ids, np.uint8)[sample.labels]


def split_of(index):
    return "train" if index < 6 else "val"


def test_reading_back_gives_the_samples(source):
    records = list(FolderDataset(source))
    assert [record.split for record in records] == ["train"] * 6 + ["val"] * 3
    for index, record in enumerate(records):
        sample, direct = make_sample(index), Record.from_sample(make_sample(index))
        for one in (record, direct):
            assert (one.id, one.prompt, one.seed, one.draw) == (f"{index:06d}", sample.prompt, 2**62, index)
            assert np.array_equal(one.image, sample.image) and np.array_equal(one.labels, sample.labels)
            for thing in one.objects:
                assert thing.mask.dtype == np.bool_ and np.array_equal(thing.mask, sample.masks[thing.name])
                assert (thing.area, thing.box) == (sample.areas[thing.name], sample.boxes[thing.name])


def test_writers_take_samples_directly(source, tmp_path):
    for format in WRITERS:
        converted = convert(source, tmp_path / format, format)
        direct = tmp_path / f"{format}-direct"
        direct.mkdir()
        writer = open_writer(format, direct, Settings(Classes(tuple(NAMES))))
        for index in range(COUNT):
            writer.put(Record.from_sample(make_sample(index), split_of(index)))
        writer.close()
        files = {p.relative_to(direct): p.read_bytes() for p in direct.rglob("*") if p.is_file()}
        files_converted = {p.relative_to(converted): p.read_bytes() for p in converted.rglob("*") if p.is_file()}
        marker = json.loads(files_converted.pop(next(p for p in files_converted if p.name == MARKER)))
        assert (marker["format"], marker["classes"], marker["samples"]) == (format, NAMES, COUNT)
        assert files == files_converted


@pytest.mark.parametrize("seed", range(6))
def test_rle_and_polygons_decode_to_the_mask(seed):
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    mask = rng.random(shape) > rng.random()
    for case in (mask, np.ones(shape, bool), np.zeros(shape, bool)):
        encoded = encode_rle(case)
        assert np.array_equal(coco_mask.decode(encoded), case)
        reference = coco_mask.encode(np.asfortranarray(case.astype(np.uint8)))
        assert encoded["counts"] == reference["counts"].decode()
        polygons = [[v for point in points for v in point] for points in solid_polygons(case)]
        if polygons:
            decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *shape)))
            assert np.array_equal(decoded, case)
        else:
            assert not case.any()


def test_large_mask_has_long_runs():
    from pycocotools import mask as coco_mask

    mask = np.zeros((700, 900), bool)
    mask[100:600, 333:801] = True
    mask[:, 850:] = True
    assert np.array_equal(coco_mask.decode(encode_rle(mask)), mask)


def test_contours_tell_holes_from_outlines():
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    outer, holes = contours(ring)
    assert outer == [[(0, 0), (5, 0), (5, 5), (0, 5)]] and len(holes) == 1
    assert sorted(holes[0]) == [(2, 2), (2, 3), (3, 2), (3, 3)]
    corners = np.eye(2, dtype=bool)
    assert len(contours(corners)[0]) == 2


@pytest.mark.parametrize("options", [[], ["--polygons"], ["--png"]])
def test_coco(source, tmp_path, options):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = convert(source, tmp_path / "coco", "coco", *options)
    seen = []
    for split in ("train", "val"):
        coco = COCO(out / "annotations" / f"instances_{split}.json")
        assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == dict(enumerate(NAMES, 1))
        detections = []
        for image in coco.loadImgs(coco.getImgIds()):
            index = int(image["file_name"].split(".")[0])
            sample, file = make_sample(index), out / split / image["file_name"]
            assert split == split_of(index) and Image.open(file).size == (image["width"], image["height"])
            if options == ["--png"]:
                assert np.array_equal(np.asarray(Image.open(file)), sample.image)
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            names = [NAMES[a["category_id"] - 1] for a in annotations]
            assert names == [name for name in sample.objects if sample.areas[name]]
            for name, annotation in zip(names, annotations, strict=True):
                assert np.array_equal(coco.annToMask(annotation), sample.masks[name])
                assert annotation["area"] == sample.areas[name]
                assert tuple(annotation["bbox"]) == sample.boxes[name]
                assert isinstance(annotation["segmentation"], list) == (options == ["--polygons"])
                seen.append(annotation["id"])
                detection = {"image_id": image["id"], "category_id": annotation["category_id"], "score": 1.0}
                detections.append({**detection, "segmentation": encode_rle(sample.masks[name])})
        for kind in ("segm", "bbox"):
            evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(1.0) and evaluation.stats[1] == pytest.approx(1.0)
    assert sorted(seen) == list(range(1, len(seen) + 1))  # unique over both files, from 1


def test_coco_in_supervision(source, tmp_path):
    import supervision

    out = convert(source, tmp_path / "coco", "coco", "--png")
    data = supervision.DetectionDataset.from_coco(
        str(out / "train"), str(out / "annotations" / "instances_train.json"), force_masks=True
    )
    assert data.classes == NAMES and len(data) == 6
    for path, image, detections in data:
        sample = make_sample(int(path[-10:-4]))
        assert np.array_equal(image[..., ::-1], sample.image)  # OpenCV's order
        for mask, category in zip(detections.mask, detections.class_id, strict=True):
            assert np.array_equal(mask, sample.masks[NAMES[category]])


def test_panoptic(source, tmp_path):
    out = convert(source, tmp_path / "panoptic", "coco-panoptic")
    for split in ("train", "val"):
        table = json.loads((out / "annotations" / f"panoptic_{split}.json").read_text())
        categories = {category["id"]: category for category in table["categories"]}
        assert [c["name"] for c in categories.values()] == NAMES and all(c["isthing"] == 1 for c in categories.values())
        assert [a["image_id"] for a in table["annotations"]] == [i["id"] for i in table["images"]]
        for annotation in table["annotations"]:
            index = int(annotation["file_name"][:6])
            rgb = np.asarray(Image.open(out / "annotations" / f"panoptic_{split}" / annotation["file_name"]))
            ids = rgb.astype(int) @ [1, 256, 65536]
            assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
            drawn = np.zeros_like(ids)
            for segment in annotation["segments_info"]:
                mask = ids == segment["id"]
                assert (mask.sum(), mask_box(mask)) == (segment["area"], segment["bbox"])
                assert segment["id"] == colour_id(categories[segment["category_id"]]["color"])
                drawn[mask] = segment["category_id"]
            assert np.array_equal(drawn, class_ids(index))


def test_colours_of_classes_are_vocs_and_all_different():
    assert [v for k in range(256) for v in class_colour(k)] == voc_palette()
    assert len({colour_id(class_colour(k)) for k in range(5000)}) == 5000


def test_voc(source, tmp_path):
    out = convert(source, tmp_path / "voc", "voc") / "VOCdevkit" / "VOC2012"
    lists = {p.stem: p.read_text().split() for p in (out / "ImageSets" / "Segmentation").iterdir()}
    ids = [f"{index:06d}" for index in range(COUNT)]
    assert lists == {"train": ids[:6], "val": ids[6:], "trainval": ids}
    for index, id in enumerate(ids):
        classes, objects = (Image.open(out / f"Segmentation{kind}" / f"{id}.png") for kind in ("Class", "Object"))
        assert classes.mode == objects.mode == "P" and classes.getpalette()[:12] == voc_palette()[:12]
        assert np.array_equal(np.asarray(classes), class_ids(index))
        assert np.array_equal(np.asarray(objects), make_sample(index).labels)
        assert Image.open(out / "JPEGImages" / f"{id}.jpg").size == (WIDTH, HEIGHT)
    assert (out / "labelmap.txt").read_text().splitlines()[1:] == [
        "background:0,0,0::", "cat:128,0,0::", "dog:0,128,0::", "tv monitor:128,128,0::",
    ]  # fmt: skip


def test_vocs_own_ids(source, tmp_path):
    out = convert(source, tmp_path / "voc", "voc", "--names", "voc")
    mask = np.asarray(Image.open(out / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "000001.png"))
    assert set(np.unique(mask)) <= {0, 12, 20} and 12 in mask


def test_names_in_the_order_of_a_file(source, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("bird\nTVmonitor\ncat\ndog\n")
    out = convert(source, tmp_path / "mmseg", "mmseg", "--names", names)
    table = np.array([0, 3, 4, 2], np.uint8)  # cat, dog, tv monitor
    mask = np.asarray(Image.open(out / "ann_dir" / "train" / "000001.png"))
    assert np.array_equal(mask, table[class_ids(1)])


def test_void_border():
    labels = np.zeros((7, 9), np.uint8)
    labels[:, 5:] = 1
    assert np.array_equal(with_void(labels, labels, 0), labels)
    for width in (1, 2):
        void = np.zeros(9, bool)
        void[5 - width : 5 + width] = True
        expected = np.where(void, 255, labels)
        assert np.array_equal(with_void(labels, labels, width), expected)


def test_void_border_in_voc(source, tmp_path):
    out = convert(source, tmp_path / "voc", "voc", "--void-border", 1) / "VOCdevkit" / "VOC2012"
    mask = np.asarray(Image.open(out / "SegmentationClass" / "000000.png"))
    assert (mask == 255).any() and np.array_equal(mask[mask != 255], class_ids(0)[mask != 255])


def test_mmseg(source, tmp_path):
    out = convert(source, tmp_path / "mmseg", "mmseg", "--png")
    for index in range(COUNT):
        mask = Image.open(out / "ann_dir" / split_of(index) / f"{index:06d}.png")
        assert np.array_equal(np.asarray(mask), class_ids(index)) and np.asarray(mask).dtype == np.uint8
        image = Image.open(out / "img_dir" / split_of(index) / f"{index:06d}.png")
        assert np.array_equal(np.asarray(image), make_sample(index).image)
    assert (out / "classes.txt").read_text().splitlines() == ["background", *NAMES]


def test_webdataset(source, tmp_path):
    import webdataset

    out = convert(source, tmp_path / "one", "webdataset", "--png", "--shard-size", 4)
    again = convert(source, tmp_path / "two", "webdataset", "--png", "--shard-size", 4)
    tars = sorted(p.name for p in out.glob("*.tar"))
    assert tars == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in tars)
    with tarfile.open(out / tars[0]) as tar:
        assert tar.getnames()[:4] == ["000000.png", "000000.seg.png", "000000.json", "000000.txt"]
    samples = list(webdataset.WebDataset([str(out / name) for name in tars], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{index:06d}" for index in range(COUNT)]
    decoded = webdataset.WebDataset([str(out / name) for name in tars], shardshuffle=False).decode("pil")
    for index, sample in enumerate(decoded):
        expected = make_sample(index)
        assert np.array_equal(np.asarray(sample["png"]), expected.image) and sample["txt"] == expected.prompt
        raw = samples[index]["seg.png"]
        (tmp_path / "mask.png").write_bytes(raw)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "mask.png")), class_ids(index))
        assert sample["json"]["seed"] == 2**62
        assert [thing["name"] for thing in sample["json"]["objects"]] == list(expected.objects)


def check_hugging_face(data):
    """Splits, columns and pixels as `datasets` gives them."""
    assert {name: len(part) for name, part in data.items()} == {"train": 6, "validation": 3}
    for part in data.values():
        for row in part:
            expected = make_sample(int(row["id"]))
            assert row["prompt"] == expected.prompt and row["seed"] == 2**62 and row["width"] == WIDTH
            assert np.array_equal(np.asarray(row["image"]), expected.image)
            assert np.array_equal(np.asarray(row["mask"]), class_ids(int(row["id"])))
            assert [thing["name"] for thing in row["objects"]] == list(expected.objects)
            assert [tuple(thing["box"]) for thing in row["objects"]] == list(expected.boxes.values())


@pytest.mark.parametrize("format", ["hf-imagefolder", "hf-parquet"])
def test_hugging_face(source, tmp_path, format):
    import datasets

    out = convert(source, tmp_path / "hf", format, "--png", "--shard-size", 4)
    cache = str(tmp_path / "cache")
    check_hugging_face(datasets.load_dataset(str(out), cache_dir=cache))
    if format == "hf-imagefolder":
        check_hugging_face(datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=cache))
    else:
        names = sorted(file.name for file in (out / "data").iterdir())
        assert names == [
            "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet",
        ]  # fmt: skip


def test_yolo(source, tmp_path, capsys):
    import supervision
    import yaml

    out = convert(source, tmp_path / "yolo", "yolo-seg")
    assert "YOLO's polygons filled" in capsys.readouterr().err
    assert yaml.safe_load((out / "data.yaml").read_text()) == {
        "train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES)),
    }  # fmt: skip
    for index in range(COUNT):
        sample, outer = make_sample(index), {}
        lines = (out / "labels" / split_of(index) / f"{index:06d}.txt").read_text().splitlines()
        for line in lines:
            category, *values = line.split()
            points = np.array(values, float).reshape(-1, 2)
            assert points.min() >= 0 and points.max() <= 1
            corners = [tuple(point) for point in np.rint(points * [WIDTH, HEIGHT]).astype(int).tolist()]
            outer.setdefault(NAMES[int(category)], []).append(corners)
        assert outer == {n: contours(sample.masks[n])[0] for n in sample.objects if sample.areas[n]}
    data = supervision.DetectionDataset.from_yolo(
        str(out / "images" / "train"), str(out / "labels" / "train"), str(out / "data.yaml"), force_masks=True
    )
    assert data.classes == NAMES
    assert len(data) == 6 and all(len(detections) for _, _, detections in data)
