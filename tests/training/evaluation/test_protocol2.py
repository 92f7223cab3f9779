"""gd-eval protocol2: a network that learns from generated images, on a tiny model; and that such a network learns."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.detector import save_mask2former
from PIL import Image

from grounded_diffusion.engine.dataset.formats.common import encode_labels
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.detectors.network import IGNORED, Network, open_network, targets, train_network
from grounded_diffusion.training.evaluation import cli
from grounded_diffusion.training.evaluation.protocol2 import Known, class_map, drawer, grouped, iou_by_name
from grounded_diffusion.training.grounding.annotations import VocFolder
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.things.scenes import Scenes

NAMES = ["dog", "cactus"]


def gd_eval(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """(folder, options) of a whole table."""
    out = tmp_path_factory.mktemp("table2") / "out"
    sizes = ["--network-iterations", 2, "--network-batch", 4, "--test-images", 12]
    options = ["protocol2", *small, *sizes, "--rendered", "--out", out]
    assert gd_eval(*options) == 0
    return out, options


def figures(out):
    return json.loads((out / "figures.json").read_text())


def test_every_row_of_the_table_is_measured(run):
    found = figures(run[0])
    rows = [
        "protocol2.one",
        "protocol2.two",
        "protocol2.mixture",
        *(f"protocol2.{m}.mixture" for m in ("exact", "judge", "daam")),
    ]
    for row in rows:
        assert all(0 <= found[f"{row}.{column}"] <= 100 for column in ("seen", "unseen", "harmonic", "with_background"))
        assert row.replace("mixture", "split1.mixture") + ".seen" in found or "mixture" not in row
    assert found["protocol2.harmonic"] == found["protocol2.mixture.harmonic"]
    assert found["protocol2.bound"] == found["protocol2.exact.mixture.harmonic"]
    assert "12 images of one object and 3 of two" in found["about.protocol2"]


def test_a_network_is_one_of_transformers(run):
    for folder in (run[0] / "networks").iterdir():
        config = json.loads((folder / "network" / "config.json").read_text())
        assert config["id2label"]["0"] == "background" and len(config["id2label"]) == 5


def test_the_same_command_measures_nothing_twice(run, capsys):
    out, options = run
    before = {
        file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "figures.json"
    }
    assert gd_eval(*options) == 0
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "figures.json"}
    assert after == before and "training a" not in capsys.readouterr().out


def test_kinds_choose_the_images(run, tmp_path, capsys):
    out, options = run
    shutil.copytree(out, tmp_path / "out")
    chosen = ["--methods", "head", "--kinds", "two", "--out", tmp_path / "out"]
    assert gd_eval(*options, *chosen) == 0
    said = capsys.readouterr().out
    assert "head, two, split1" in said and "training a" not in said
    assert "head, one" not in said and "head, mixture" not in said


def test_the_page_shows_the_papers_table_beside_it(run, tmp_path):
    assert gd_eval("report", run[0], "--truth", tmp_path / "truth.json", "--out", tmp_path / "page.md") == 0
    page = (tmp_path / "page.md").read_text()
    assert "(Table 2)" in page and "(66.2)" in page and "the bound" in page


def test_masks_with_nothing_to_test_on_are_refused(small, tmp_path, capsys):
    assert gd_eval("protocol2", *small, "--out", tmp_path) == 2
    assert "give --rendered, --voc or --coco" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scenes():
    """(to train on, to test on)"""
    make = lambda seed: Scenes(NAMES, [("dog", "cactus")], 24, 8, 32, seed)
    return Known(make(1), NAMES, (32, 32)), Known(make(2), NAMES)


def test_a_network_learns_exact_masks_and_not_exchanged_ones(scenes, tmp_path):
    train, test = scenes

    class Exchanged(Known):
        def read(self, k):
            image, drawn = super().read(k)
            return image, np.array([0, 2, 1], np.uint8)[drawn]

    network, found = Network(iterations=60, batch=12), {}
    for label, source in (("exact", train), ("exchanged", Exchanged(train.annotations, NAMES, (32, 32)))):
        learnt = train_network(
            network.source, network.stage, NAMES, 32, tmp_path / label, drawer([source]), "cpu", lambda line: None
        )
        found[label] = iou_by_name(learnt, test, NAMES)
    assert min(found["exact"].values()) > 50
    assert max(found["exchanged"][name] for name in NAMES) < 20


def test_class_maps_have_the_smaller_object_in_front():
    large, small = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    small[1, 1] = True
    for masks, classes in (([large, small], [1, 2]), ([small, large], [2, 1])):
        drawn = class_map(masks, classes)
        assert drawn[1, 1] == 2 and (drawn == 1).sum() == 15


def test_annotated_images_have_their_own_size_to_test_on_and_one_size_to_train_on(tmp_path):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / name).mkdir(parents=True)
    classes = np.zeros((40, 60), np.uint8)
    classes[:, :20], classes[:, 20:30], classes[:, 30] = 8, 15, 255  # a cat, a person, and pixels that are left open
    (tmp_path / "SegmentationClass" / "1.png").write_bytes(encode_labels(classes))
    Image.new("RGB", (60, 40), "green").save(tmp_path / "JPEGImages" / "1.jpg")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("1\n")
    annotations = VocFolder.open(tmp_path, "val")
    image, drawn = Known(annotations, ["bird", "cat"]).read(0)
    assert image.shape == (40, 60, 3) and np.array_equal(drawn, np.where(classes == 8, 2, 0))
    image, drawn = Known(annotations, ["bird", "cat"], (64, 32)).read(0)
    assert image.shape == (64, 32, 3) and drawn.shape == (64, 32) and 0.3 < (drawn == 2).mean() < 0.36
    assert len(Known(annotations, ["cat"], limit=5)) == 1


def test_groups_of_table_2():
    iou = {"background": 90.0, "dog": 60.0, "cat": 80.0, "cactus": 35.0}
    found = grouped(iou, Split(("dog", "cat"), ("cactus", "bird"), ()))
    assert found == {"with_background": 66.25, "seen": 70.0, "unseen": 35.0, "harmonic": 46.67}


def test_a_universal_checkpoint_is_trained_by_its_masks(tmp_path, scenes):
    source = save_mask2former(tmp_path / "start", ["zebra", "cactus"])
    network = Network(source=str(source), iterations=2, batch=4)
    learnt = train_network(
        network.source, network.stage, NAMES, 32, tmp_path / "run", drawer(scenes[:1]), "cpu", lambda line: None
    )
    assert learnt.labels == {0: "background", 1: "dog", 2: "cactus"} and learnt.by_query
    assert learnt.class_maps(np.zeros((2, 48, 40, 3), np.uint8)).shape == (2, 48, 40)


def test_padding_counts_for_nothing():
    model, _ = open_network(None, NAMES, 64)
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8), "pixel_mask": torch.zeros(1, 8, 8)}
    inputs["pixel_mask"][:, :4, :6] = 1
    labels = targets(model, np.ones((1, 16, 24), np.uint8), inputs)["labels"][0]
    assert (labels[:4, :6] == 1).all() and (labels == IGNORED).sum() == 64 - 24


def test_a_checkpoint_that_learns_no_class_maps_is_refused(tmp_path):
    from transformers import DetrConfig, DetrForSegmentation, DetrImageProcessorPil, ResNetConfig

    outs = [f"stage{k}" for k in (1, 2, 3, 4)]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=outs
    )
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=8, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, num_queries=4,
    )  # fmt: skip
    DetrForSegmentation(config).save_pretrained(tmp_path)
    DetrImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a detr model, which is not trained on class maps"):
        open_network(str(tmp_path), NAMES, 64)
