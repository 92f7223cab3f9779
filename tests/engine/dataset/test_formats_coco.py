"""COCO instances and panoptic: run lengths and polygons decode to the masks, the evaluator agrees with itself."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.formats import Classes, Settings, open_format
from grounded_diffusion.engine.dataset.formats.common import class_colour, voc_palette, with_void
from grounded_diffusion.engine.dataset.formats.panoptic import colour_id
from grounded_diffusion.engine.dataset.formats.polygons import contours, solid_polygons
from grounded_diffusion.engine.dataset.formats.rle import encode_rle
from grounded_diffusion.engine.dataset.instances import mask_box
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.prompts.vocabulary import COCO_IDS


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
    assert outer == [[(0, 0), (5, 0), (5, 5), (0, 5)]]
    assert len(holes) == 1
    assert sorted(holes[0]) == [(2, 2), (2, 3), (3, 2), (3, 3)]
    corners = np.eye(2, dtype=bool)
    assert len(contours(corners)[0]) == 2


@pytest.mark.parametrize("options", [[], ["--polygons"], ["--png"]])
def test_coco(blobs, tmp_path, options):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = blobs.convert(tmp_path / "coco", "coco", *options)
    seen = []
    for split in ("train", "val"):
        coco = COCO(out / "annotations" / f"instances_{split}.json")
        assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == dict(enumerate(blobs.names, 1))
        detections = []
        for image in coco.loadImgs(coco.getImgIds()):
            index = int(image["file_name"].split(".")[0])
            sample, file = blobs.sample(index), out / "images" / split / image["file_name"]
            assert split == blobs.split(index)
            assert Image.open(file).size == (image["width"], image["height"])
            if options == ["--png"]:
                assert np.array_equal(np.asarray(Image.open(file)), sample.image)
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            names = [blobs.names[a["category_id"] - 1] for a in annotations]
            assert names == [name for name in sample.names if sample.object(name).area]
            for name, annotation in zip(names, annotations, strict=True):
                assert np.array_equal(coco.annToMask(annotation), sample.masks[name])
                assert annotation["area"] == sample.object(name).area
                assert tuple(annotation["bbox"]) == sample.object(name).box
                assert isinstance(annotation["segmentation"], list) == (options == ["--polygons"])
                seen.append(annotation["id"])
                detection = {"image_id": image["id"], "category_id": annotation["category_id"], "score": 1.0}
                detections.append({**detection, "segmentation": encode_rle(sample.masks[name])})
        for kind in ("segm", "bbox"):
            evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in detections]), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(1.0)
            assert evaluation.stats[1] == pytest.approx(1.0)
    assert sorted(seen) == list(range(1, len(seen) + 1))  # unique over both files, from 1


@pytest.mark.parametrize(("format", "table"), [("coco", "instances"), ("coco-panoptic", "panoptic")])
def test_captions_seeds_and_scores(blobs, tmp_path, format, table):
    """A captions file as COCO has it, and fields of ours beside COCO's own."""
    from pycocotools.coco import COCO

    out, seen = blobs.convert(tmp_path / "coco", format) / "annotations", []
    for split in ("train", "val"):
        captions = COCO(out / f"captions_{split}.json")
        for image in captions.loadImgs(captions.getImgIds()):
            (caption,) = captions.loadAnns(captions.getAnnIds(image["id"]))
            sample = blobs.sample(image["id"] - 1)
            assert (caption["caption"], image["seed"], image["draw"]) == (sample.prompt, sample.seed, sample.draw)
            seen.append(caption["id"])
        made = json.loads((out / f"{table}_{split}.json").read_text())
        assert made["images"] == captions.dataset["images"]
        things = [thing for one in made["annotations"] for thing in one.get("segments_info", [one])]
        assert {thing["score"] for thing in things} == {0.75}
    assert sorted(seen) == list(range(1, blobs.count + 1))


def test_coco_in_supervision(blobs, tmp_path):
    import supervision

    out = blobs.convert(tmp_path / "coco", "coco", "--png")
    data = supervision.DetectionDataset.from_coco(
        str(out / "images" / "train"), str(out / "annotations" / "instances_train.json"), force_masks=True
    )
    assert data.classes == list(blobs.names)
    assert len(data) == 6
    for path, image, detections in data:
        sample = blobs.sample(int(path[-10:-4]))
        assert np.array_equal(image[..., ::-1], sample.image)  # OpenCV's order
        for mask, category in zip(detections.mask, detections.class_id, strict=True):
            assert np.array_equal(mask, sample.masks[blobs.names[category]])


def test_panoptic(blobs, tmp_path):
    out = blobs.convert(tmp_path / "panoptic", "coco-panoptic")
    for split in ("train", "val"):
        table = json.loads((out / "annotations" / f"panoptic_{split}.json").read_text())
        categories = {category["id"]: category for category in table["categories"]}
        assert [c["name"] for c in categories.values()] == list(blobs.names)
        assert all(c["isthing"] == 1 for c in categories.values())
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
            assert np.array_equal(drawn, blobs.class_map(index))


def test_colours_of_classes_are_vocs_and_all_different():
    assert tuple(v for k in range(256) for v in class_colour(k)) == voc_palette()
    assert len({colour_id(class_colour(k)) for k in range(5000)}) == 5000


def test_cocos_own_ids(blobs, tmp_path):
    """COCO's names give COCO's ids, which leave gaps, and its supercategories."""
    from pycocotools.coco import COCO

    data = shutil.copytree(blobs.path, tmp_path / "data")
    file = data / "metadata.jsonl"
    file.write_text(file.read_text().replace('"name": "tv monitor"', '"name": "tv"'))
    convert = ["convert", str(data), "--names", "coco", "--png", "--format"]
    for format in ("coco", "coco-panoptic", "mmseg"):
        assert main([*convert, format, "--out", str(tmp_path / format)]) == 0
    ids = {"cat": 17, "dog": 18, "tv monitor": 72}
    coco = COCO(tmp_path / "coco" / "annotations" / "instances_train.json")
    categories = {category["id"]: category for category in coco.loadCats(coco.getCatIds())}
    assert sorted(categories) == sorted(COCO_IDS)
    assert categories[72]["supercategory"] == "electronic"
    for annotation in coco.loadAnns(coco.getAnnIds()):
        sample = blobs.sample(annotation["image_id"] - 1)
        name = next(name for name, k in ids.items() if k == annotation["category_id"])
        assert np.array_equal(coco.annToMask(annotation), sample.masks[name])
    table = json.loads((tmp_path / "coco-panoptic/annotations/panoptic_val.json").read_text())
    used = {segment["category_id"] for a in table["annotations"] for segment in a["segments_info"]}
    assert used == set(ids.values())
    assert len(table["categories"]) == 80
    labels = np.asarray(Image.open(tmp_path / "mmseg/ann_dir/train/000001.png"))
    assert np.array_equal(labels, np.array([0, 17, 18, 72], np.uint8)[blobs.class_map(1)])
    names = (tmp_path / "mmseg/classes.txt").read_text().split("\n")
    assert (names[0], names[12], names[18], names[90]) == ("background", "", "dog", "toothbrush")


def test_void_leaves_panoptic_segments(blobs, tmp_path):
    out = blobs.convert(tmp_path / "out", "coco-panoptic", "--void-border", 1)
    table = json.loads((out / "annotations/panoptic_train.json").read_text())
    for annotation in table["annotations"]:
        index = int(annotation["file_name"][:6])
        rgb = np.asarray(Image.open(out / "annotations/panoptic_train" / annotation["file_name"]))
        labels = with_void(blobs.sample(index).labels, 1)
        assert np.array_equal(rgb.any(-1), (labels > 0) & (labels < 255))
        assert (labels == 255).any()
        ids = rgb.astype(int) @ [1, 256, 65536]
        assert {s["id"]: s["area"] for s in annotation["segments_info"]} == {
            int(k): int((ids == k).sum()) for k in np.unique(ids) if k
        }


class SyntheticRows:
    """Rows of a data set of any size, made as they are read. Notes the largest memory of the process meanwhile."""

    def __init__(self, count):
        self.count, self.peak = count, 0

    def __iter__(self):
        box, rle = [10, 20, 30, 40], {"size": [512, 512], "counts": "0" * 300}
        for index in range(self.count):
            if index % 5000 == 0:
                self.peak = max(self.peak, resident())
            thing = {"name": "cat", "label": 1, "area": 900, "box": box, "segmentation": rle, "score": 0.5}
            yield {"id": f"{index:06d}", "index": index, "width": 512, "height": 512, "objects": [thing],
                   "split": ("train", "val")[index % 10 == 0], "prompt": "a cat", "seed": 7, "draw": index}  # fmt: skip


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_finishing_takes_the_same_memory_for_any_size(tmp_path):
    storage, format = open_storage(tmp_path), open_format("coco", Settings(Classes(("cat",))))
    few, many = SyntheticRows(5000), SyntheticRows(200_000)
    format.finish(storage, few, {})
    format.finish(storage, many, {})
    assert many.peak - few.peak < 8_000_000
    files = [tmp_path / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
    assert sum(file.stat().st_size for file in files) > 80_000_000
    table = json.loads(files[1].read_text())
    assert [image["id"] for image in table["images"]] == list(range(1, 200_000, 10))
    assert [a["id"] for a in table["annotations"]] == [a["image_id"] for a in table["annotations"]]
    assert [a["id"] for a in table["annotations"]] == list(range(1, 200_000, 10))


def test_an_empty_data_set_has_its_tables(tmp_path):
    storage = open_storage(tmp_path)
    for name in ("coco", "coco-panoptic", "voc", "yolo-seg", "hf-imagefolder", "hf-parquet", "mmseg", "webdataset"):
        format = open_format(name, Settings(Classes(("cat",)), 95))
        format.finish(storage, [], {})
        for path, content in format.pack(0, 1, []):
            storage.put(path, content)
    table = json.loads((tmp_path / "annotations/instances_train.json").read_text())
    assert (table["images"], table["annotations"], len(table["categories"])) == ([], [], 1)
    assert (tmp_path / "train-000000.tar").is_file()
    assert (tmp_path / "data/train-00000-of-00001.parquet").is_file()
