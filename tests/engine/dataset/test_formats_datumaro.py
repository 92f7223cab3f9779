"""Data sets read by datumaro. It pins older versions than ours, so it runs in an environment of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.formats.common import class_colour
from grounded_diffusion.engine.dataset.formats.panoptic import colour_id
from grounded_diffusion.engine.prompts.vocabulary import COCO_NAMES

pytestmark = pytest.mark.slow

READER = """
import json, sys
import datumaro, numpy
name, path, out = sys.argv[1:]
data = datumaro.Dataset.import_from(path, name)
labels = [category.name for category in data.categories()[datumaro.AnnotationType.label]]
items, arrays = [], {}
for item in data:
    shapes = []
    for shape in item.annotations:
        kind = "box" if isinstance(shape, datumaro.Bbox) else "mask"
        if kind == "mask":
            arrays[f"{len(items)}-{len(shapes)}"] = numpy.asarray(shape.image, bool)
        shapes.append({"kind": kind, "name": labels[shape.label], "id": int(shape.id), "area": float(shape.get_area()),
                       "box": [float(side) for side in shape.get_bbox()]})
    items.append({"id": item.id, "split": item.subset, "shapes": shapes, "size": list(item.media.data.shape[:2])})
numpy.savez(out + ".npz", **arrays)
json.dump({"labels": labels, "items": items}, open(out + ".json", "w"))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A function that reads a data set with datumaro: labels, and by (id, split) what an item shows."""
    folder = tmp_path_factory.mktemp("datumaro")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "datumaro==1.13.12"], check=True)

    def read(name: str, path: Path):
        out = folder / name
        done = subprocess.run([python, "-c", READER, name, path, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told, arrays = json.loads(out.with_suffix(".json").read_text()), np.load(out.with_suffix(".npz"))
        for number, item in enumerate(told["items"]):
            for k, shape in enumerate(item["shapes"]):
                shape["mask"] = arrays[f"{number}-{k}"] if shape["kind"] == "mask" else None
        return told["labels"], {(item["id"], item["split"]): item for item in told["items"]}

    return read


def samples(blobs):
    for index in range(blobs.count):
        yield (f"{index:06d}", blobs.split(index)), blobs.sample(index)


def of_kind(item, kind):
    return {shape["name"]: shape for shape in item["shapes"] if shape["kind"] == kind}


def test_voc(blobs, tmp_path, read):
    labels, items = read("voc_segmentation", blobs.convert(tmp_path / "out", "voc") / "VOCdevkit" / "VOC2012")
    assert labels == ["background", *blobs.names]
    assert len(items) == 2 * blobs.count  # trainval lists all again
    for (id, split), sample in samples(blobs):
        for item in (items[id, split], items[id, "trainval"]):
            masks = of_kind(item, "mask")
            on_top = {name: sample.labels == k for k, name in enumerate(sample.names, 1)}
            assert masks.keys() == {name for name, mask in on_top.items() if mask.any()}
            assert item["size"] == [40, 56]
            assert all(np.array_equal(masks[name]["mask"], on_top[name]) for name in masks)


@pytest.mark.parametrize("names", [None, "coco"])
def test_coco_instances(blobs, tmp_path, read, names):
    options = [] if names is None else ["--names", names]
    labels, items = read("coco_instances", convert_known(blobs, tmp_path, "coco", *options))
    assert labels == (list(COCO_NAMES) if names else list(blobs.names))
    ids = []
    for key, sample in samples(blobs):
        boxes, masks = of_kind(items[key], "box"), of_kind(items[key], "mask")
        for name in sample.names:
            shown = "tv" if names and name == "tv monitor" else name
            assert (shown in masks) == (shown in boxes) == (sample.object(name).area > 0)
            if sample.object(name).area:
                assert np.array_equal(masks[shown]["mask"], sample.masks[name])
                assert masks[shown]["area"] == sample.object(name).area
                assert tuple(boxes[shown]["box"]) == sample.object(name).box
                ids.append(masks[shown]["id"])
    assert sorted(ids) == list(range(1, len(ids) + 1))


def convert_known(blobs, tmp_path, format, *options):
    """Convert; with COCO's names, where COCO says "tv", from a copy that says so too."""
    if not options:
        return blobs.convert(tmp_path / "out", format)
    data = shutil.copytree(blobs.path, tmp_path / "data")
    file = data / "metadata.jsonl"
    file.write_text(file.read_text().replace('"name": "tv monitor"', '"name": "tv"'))
    assert main(["convert", str(data), "--format", format, "--out", str(tmp_path / "out"), *options]) == 0
    return tmp_path / "out"


def test_coco_panoptic(blobs, tmp_path, read):
    labels, items = read("coco_panoptic", blobs.convert(tmp_path / "out", "coco-panoptic"))
    assert labels == list(blobs.names)
    assert len(items) == blobs.count
    for key, sample in samples(blobs):
        masks = of_kind(items[key], "mask")
        for k, name in enumerate(sample.names, 1):
            assert (name in masks) == (sample.labels == k).any()
            if name in masks:
                assert np.array_equal(masks[name]["mask"], sample.labels == k)
                assert masks[name]["id"] == colour_id(class_colour(blobs.names.index(name) + 1))


def test_yolo_boxes(blobs, tmp_path, read):
    """Of YOLO's two label files, datumaro knows the one with boxes."""
    labels, items = read("yolo", blobs.convert(tmp_path / "out", "yolo"))
    assert labels == list(blobs.names)
    assert len(items) == blobs.count
    for key, sample in samples(blobs):
        boxes = of_kind(items[key], "box")
        assert boxes.keys() == {name for name in sample.names if sample.object(name).area}
        for name, shape in boxes.items():
            assert shape["box"] == pytest.approx(sample.object(name).box, abs=1e-3)
