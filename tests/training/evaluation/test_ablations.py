"""gd-eval ablation on a tiny model: the heads that each trains, and that nothing is trained twice."""

import json

import numpy as np
import pytest

from grounded_diffusion.training.evaluation import cli
from grounded_diffusion.training.evaluation.ablations import quarters
from grounded_diffusion.training.evaluation.heads import MissingMasks, missed
from grounded_diffusion.training.grounding.batches import Pool
from grounded_diffusion.training.grounding.store import ExampleSet

LABELS = {
    "timestep": ["t1", "t401"],
    "zero-masks": ["trust", "skip"],
    "objects": ["one", "two", "mixture"],
    "seen-names": ["seen1", "seen3"],
    "real": ["real", "sim", "sim_real"],
}


def gd_eval(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all of them: images to measure on are shared."""
    return tmp_path_factory.mktemp("ablations") / "out"


@pytest.mark.parametrize("name", LABELS)
def test_every_head_is_measured_in_every_group(small, out, name, capsys):
    options = ["ablation", name, *small, "--out", out, "--timesteps", 1, 401, "--counts", 1, 3, "--rendered"]
    options += ["--real-images", 12]
    assert gd_eval(*options) == 0
    found = json.loads((out / "figures.json").read_text())
    tracks = ["oracle", "exact"] if name == "real" else ["oracle"]
    for label in LABELS[name]:
        for track in tracks:
            assert 0 <= found[f"ablation.{name}.{label}.{track}.one_seen"] <= 100
            assert 0 <= found[f"ablation.{name}.{label}.{track}.one_unseen"] <= 100
    heads = {file: file.stat().st_mtime_ns for file in (out / "heads").rglob("state.pt")}
    capsys.readouterr()
    assert gd_eval(*options) == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "heads").rglob("state.pt")} == heads
    assert "to train on" not in capsys.readouterr().out


def test_images_at_another_timestep_are_the_same_images(small, out):
    assert gd_eval("ablation", "timestep", *small, "--out", out, "--timesteps", 1, 401) == 0
    found = [ExampleSet(file.parent) for file in (out / "images").glob("*/examples.json")]
    judged = {one[0].timestep: one for one in found if len(one) == 15 and "model" in one.about.source}
    late, early = (judged[timestep] for timestep in sorted(judged))
    assert np.array_equal(early.image(3), late.image(3))
    assert not np.array_equal(early[3].latents, late[3].latents)


def test_the_annotated_ablation_needs_annotations(small, tmp_path, capsys):
    assert gd_eval("ablation", "real", *small, "--out", tmp_path) == 2
    assert "needs annotated images" in capsys.readouterr().err


def test_masks_that_are_missed_are_always_the_same_ones(examples):
    whole, some = Pool([ExampleSet(examples)]), MissingMasks([ExampleSet(examples)], 0.5)
    lost = [
        not some[k].masks[o].any() and bool(whole[k].masks[o].any())
        for k in range(24)
        for o in range(len(whole.names(k)))
    ]
    assert 0.2 < np.mean(lost) < 0.8
    again = MissingMasks([ExampleSet(examples)], 0.5)
    assert all(np.array_equal(again[k].masks, some[k].masks) for k in range(24))
    assert not any(missed(str(k), 0.0) for k in range(50))
    assert all(missed(str(k), 1.0) for k in range(50))


def test_quarters_of_the_names():
    assert quarters(15) == [4, 8, 11, 15]
    assert quarters(2) == [1, 2]
