"""Connected parts of a mask as objects of their own: against a plain flood fill, and as readers of the formats see."""

import json

import numpy as np
import pytest
from helpers import samples
from PIL import Image

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.formats import FORMATS, FormatOptions, open_format
from grounded_diffusion.engine.dataset.formats.common import Classes, Settings
from grounded_diffusion.engine.dataset.instances import by_components, components
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.errors import UsageError


def flood(mask):
    """Parts by their definition, numbered by their first pixels."""
    labels, count = np.zeros(mask.shape, np.int32), 0
    for y, x in np.argwhere(mask):
        if labels[y, x]:
            continue
        count += 1
        waiting = [(y, x)]
        while waiting:
            v, u = waiting.pop()
            inside = 0 <= v < mask.shape[0] and 0 <= u < mask.shape[1]
            if inside and mask[v, u] and not labels[v, u]:
                labels[v, u] = count
                waiting += [(v - 1, u), (v + 1, u), (v, u - 1), (v, u + 1)]
    return labels, count


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.7, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (23, 31)])
def test_parts_are_those_of_a_flood_fill(share, size):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(size) < share
        labels, count = components(mask)
        expected, expected_count = flood(mask)
        assert count == expected_count
        assert np.array_equal(labels, expected)


def test_a_spiral_is_one_part():
    mask = np.zeros((9, 9), np.bool_)
    mask[0, :] = mask[:, 8] = mask[8, 1:] = mask[2:, 1] = mask[2, 1:7] = mask[2:7, 6] = mask[6, 3:7] = True
    assert components(mask)[1] == flood(mask)[1] == 1


def two_dogs_and_a_cat():
    """A dog of 12 pixels, one of 6, a speck of 1; a cat lies over part of the first."""
    dog, cat = np.zeros((2, 10, 10), np.bool_)
    dog[1:4, 1:5] = dog[6:8, 6:9] = dog[9, 0] = True
    cat[3:5, 3:7] = True
    return samples.sample(3, np.zeros((10, 10, 3), np.uint8), {"dog": dog, "cat": cat})


def test_objects_are_the_parts():
    record = by_components(Record.from_sample(two_dogs_and_a_cat()), 0.02)
    assert [(thing.name, thing.label, thing.area) for thing in record.objects] == [
        ("dog", 1, 12), ("dog", 2, 6), ("cat", 3, 8),
    ]  # fmt: skip
    assert [thing.box for thing in record.objects] == [(1, 1, 4, 3), (6, 6, 3, 2), (3, 3, 4, 2)]
    labels = record.labels
    assert [int((labels == k).sum()) for k in (1, 2, 3, 255)] == [10, 6, 8, 1]
    assert all(thing.score == 0.75 for thing in record.objects)


def test_the_least_area_is_a_share_of_the_image():
    areas = lambda share: [t.area for t in by_components(Record.from_sample(two_dogs_and_a_cat()), share).objects]
    assert areas(0.0) == [12, 6, 1, 8]
    assert areas(0.07) == [12, 8]
    assert areas(0.1) == [12, 0]  # the cat stays, without a mask


def test_at_most_254_parts():
    mask = np.zeros((40, 40), np.bool_)
    mask[::2, ::2] = True
    assert len(by_components(Record.from_sample(samples.sample(0, np.zeros((40, 40, 3), np.uint8), {"dog": mask})), 0)
               .objects) == 254  # fmt: skip


def parts_of(blobs, index, least):
    """(name, area) of the parts of a sample, by flood fill."""
    found = []
    for thing in blobs.sample(index).objects:
        labels, count = flood(thing.mask)
        areas = [int((labels == k).sum()) for k in range(1, count + 1)]
        found += [(thing.name, area) for area in areas if area >= least]
    return sorted(found)


@pytest.mark.parametrize("options", [(), ("--polygons",)])
def test_coco(blobs, tmp_path, options):
    coco = pytest.importorskip("pycocotools.coco")
    out = blobs.convert(tmp_path / "coco", "coco", "--instances", "components", "--instance-area", 0.005, *options)
    for split in ("train", "val"):
        table = coco.COCO(out / "annotations" / f"instances_{split}.json")
        names = {k: entry["name"] for k, entry in table.cats.items()}
        for id in table.getImgIds():
            found = table.loadAnns(table.getAnnIds(id))
            assert sorted((names[a["category_id"]], a["area"]) for a in found) == parts_of(blobs, id - 1, 12)
            for annotation in found:
                assert int(table.annToMask(annotation).sum()) == annotation["area"]


def test_panoptic(blobs, tmp_path):
    out = blobs.convert(tmp_path / "out", "coco-panoptic", "--instances", "components", "--instance-area", 0.005)
    table = json.loads((out / "annotations/panoptic_train.json").read_text())
    several = 0
    for annotation in table["annotations"]:
        rgb = np.asarray(Image.open(out / "annotations/panoptic_train" / annotation["file_name"])).astype(int)
        ids, counts = np.unique(rgb @ [1, 256, 65536], return_counts=True)
        there = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        there.pop(0)
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert there == {id: segment["area"] for id, segment in segments.items()}
        assert all(id // 1000 == segment["category_id"] for id, segment in segments.items())
        several += len(segments) > len({segment["category_id"] for segment in segments.values()})
    assert several


@pytest.mark.parametrize("format", ["yolo", "yolo-seg"])
def test_yolo_has_a_line_for_each_part(blobs, tmp_path, format):
    out = blobs.convert(tmp_path / "out", format, "--instances", "components", "--instance-area", 0.005)
    for index in range(blobs.count):
        lines = (out / "labels" / blobs.split(index) / f"{index:06d}.txt").read_text().splitlines()
        found = sorted(blobs.names[int(line.split()[0])] for line in lines)
        assert found == sorted(name for name, _ in parts_of(blobs, index, 12))


@pytest.mark.parametrize("format", [name for name in FORMATS if "coco" not in name and "yolo" not in name])
def test_other_formats_have_none(format):
    if format == "hf-parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(UsageError, match="`instances` are for coco, coco-panoptic, yolo, yolo-seg"):
        open_format(format, Settings(Classes(("dog",)), 95, instances=0.001))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--instance-area", "0.1"], "--instance-area is of --instances components"),
        (["--instances", "components", "--instance-area", "2"], "--instance-area must be a number from 0 to 1"),
        (["--instances", "some"], "invalid choice: 'some'"),
    ],
)
def test_what_cannot_be(blobs, tmp_path, capsys, options, said):
    words = ["convert", str(blobs.path), "--format", "coco", "--out", str(tmp_path / "out"), *options]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_settings_without_instances_are_those_of_earlier_versions():
    assert "instances" not in Settings().as_json()
    assert FormatOptions(instances="components").settings("coco").as_json()["instances"] == 0.001
