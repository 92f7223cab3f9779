"""Real images as examples: a small VOC tree and a small COCO file, written here, through the autoencoder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from grounded_diffusion.engine.dataset.formats.common import encode_labels
from grounded_diffusion.engine.dataset.formats.rle import encode_rle, run_lengths
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.annotations import CocoFile, VocFolder, draw
from grounded_diffusion.training.grounding.real import cut
from grounded_diffusion.training.grounding.store import ExampleSet

CAT, DOG, PERSON = 8, 12, 15  # of VOC
SPLIT = ["--vocabulary", "voc", "--split", 1]  # dog is unseen


def gd_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


def picture(seed, size=(96, 80)):
    """RGB, (W, H)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def voc(tmp_path):
    """Three images: a cat with a person and void, a cat with a dog, a person of a few pixels."""
    folder = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    maps = {stem: np.zeros((80, 96), np.uint8) for stem in ("2007_1", "2007_2", "2007_3")}
    maps["2007_1"][20:60, 20:50] = CAT
    maps["2007_1"][20:60, 50:52] = 255
    maps["2007_1"][10:70, 60:80] = PERSON
    maps["2007_2"][20:60, 20:50], maps["2007_2"][0:20, 20:50] = CAT, DOG
    maps["2007_3"][40:44, 40:44] = PERSON
    for k, (stem, classes) in enumerate(maps.items()):
        picture(k).save(folder / "JPEGImages" / f"{stem}.jpg")
        (folder / "SegmentationClass" / f"{stem}.png").write_bytes(encode_labels(classes))
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(maps) + "\n")
    return folder


@pytest.fixture
def coco(tmp_path):
    """(file, folder): an airplane of two polygons and a couch of run lengths; a crowd of persons in a second image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in (1, 2):
        picture(k, (64, 64)).save(folder / f"{k}.png")
    couch, crowd = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    couch[40:60, 5:60], crowd[10:50, 10:50] = True, True
    plane = [[4, 4, 30, 4, 30, 20, 4, 20], [40, 4, 60, 4, 60, 20, 40, 20]]
    counts = {"size": [64, 64], "counts": run_lengths(crowd)}
    parts = [(1, 5, plane, 0), (1, 63, encode_rle(couch), 0), (2, 1, counts, 1)]
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 64, "height": 64} for k in (1, 2)],
        "annotations": [dict(id=k, image_id=image, category_id=label, segmentation=what, iscrowd=crowd)
                        for k, (image, label, what, crowd) in enumerate(parts, 1)],
        "categories": [{"id": 1, "name": "person"}, {"id": 5, "name": "airplane"}, {"id": 63, "name": "couch"}],
    }  # fmt: skip
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return file, folder


def test_a_voc_folder_becomes_examples(voc, base, tmp_path, capsys):
    options = ["real", "--base", base, "--voc", voc, *SPLIT, "--out", tmp_path / "out"]
    assert gd_train(*options) == 0
    assert "1 examples of 3 images" in capsys.readouterr().out  # a dog is unseen, a person too small
    found = ExampleSet(tmp_path / "out")
    example = found[0]
    assert example.prompt == "a photograph of a cat and a person"
    assert example.names == ("cat", "person")
    assert example.timestep == 1.0
    middle = np.asarray(Image.open(voc / "SegmentationClass/2007_1.png"))[:, 8:88]
    truth = np.asarray(Image.fromarray(middle).resize((64, 64), Image.Resampling.NEAREST))
    for mask, label in zip(example.masks, (CAT, PERSON), strict=True):
        assert np.array_equal(mask, truth == label)
    model, pixels = FrozenBase(base), torch.from_numpy(found.image(0).copy()).permute(2, 0, 1)[None]
    assert np.allclose(model.encode(pixels.float() / 127.5 - 1)[0].numpy(), example.latents, atol=1e-4)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    (tmp_path / "out/shards/000000.json").unlink()
    assert gd_train(*options) == 0
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_coco_file_becomes_examples(coco, base, tmp_path):
    file, folder = coco
    words = tmp_path / "names.txt"
    words.write_text("aeroplane\nsofa\nperson\n")
    options = ["real", "--base", base, "--coco", file, "--images", folder, "--names", words, "--out", tmp_path / "out"]
    assert gd_train(*options) == 0
    found = ExampleSet(tmp_path / "out")
    assert [found.names(k) for k in range(len(found))] == [("aeroplane", "sofa"), ("person",)]
    plane, couch = found[0].masks
    assert plane[10, 10]
    assert plane[10, 50]
    assert not plane[10, 35]
    assert couch.sum() == 20 * 55
    assert found[1].masks[0].sum() == 40 * 40


def test_run_lengths_are_read_as_cocoapi_reads_them():
    mask_tools = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    mask = rng.random((13, 17)) > 0.6
    code = encode_rle(mask)
    assert np.array_equal(draw(code, (17, 13), "it"), mask)
    assert np.array_equal(mask_tools.decode(code).astype(bool), mask)


def test_the_middle_of_an_image_is_kept():
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(50, 0))
    assert np.asarray(cut(image, (50, 50), Image.Resampling.NEAREST))[0].tolist() == list(range(25, 75))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda voc: (voc / "ImageSets/Segmentation/train.txt").unlink(), "has no ImageSets/Segmentation/train.txt"),
        (lambda voc: (voc / "SegmentationClass/2007_1.png").unlink(), "there is no image"),
        (lambda voc: (voc / "JPEGImages/2007_1.jpg").write_bytes(b"no"), "cannot read the image"),
        (lambda voc: (voc / "labelmap.txt").write_text("bg:0,0,0::\nwheel:1,1,1::\n"), "annotates none of the 15 seen"),
        (lambda voc: (voc / "ImageSets/Segmentation/train.txt").write_text("2007_3"), "none of the 1 images has"),
    ],
)
def test_a_bad_voc_folder_is_told_in_one_line(voc, base, tmp_path, capsys, damage, message):
    damage(voc)
    assert gd_train("real", "--base", base, "--voc", voc, *SPLIT, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_custom_classes_are_read_from_a_labelmap(voc):
    (voc / "labelmap.txt").write_text("# name:color_rgb:parts:actions\nbackground:0,0,0::\nwheel:128,0,0::\n")
    assert VocFolder.open(voc).labels == {1: "wheel"}


def test_a_bad_coco_file_is_told(coco):
    file, folder = coco
    content = json.loads(file.read_text())
    del content["categories"]
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="is no COCO file of instances: KeyError"):
        CocoFile.open(file, folder)
    with pytest.raises(UsageError, match="no folder of images"):
        CocoFile.open(file, folder / "none")
