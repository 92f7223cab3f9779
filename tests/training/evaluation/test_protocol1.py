"""gd-eval protocol1 on a tiny model: what is measured, that it is measured once, and what it says of bad options."""

import json
import shutil

import numpy as np
import pytest
import torch

from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.training.checkpoint import untrained_checkpoint
from grounded_diffusion.training.detectors.base import Detection
from grounded_diffusion.training.evaluation import cli
from grounded_diffusion.training.evaluation.daam import Daam, heat_maps, recording, word_tokens
from grounded_diffusion.training.evaluation.images import TestImages, exact_images, oracle_images
from grounded_diffusion.training.evaluation.methods import DetectorMethod, HeadMethod, noised
from grounded_diffusion.training.evaluation.protocol1 import measure
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.splits import Split
from grounded_diffusion.training.grounding.store import ExampleSet
from grounded_diffusion.training.images import to_uint8
from grounded_diffusion.training.things.scenes import Scenes


def gd_eval(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(small, detector, tmp_path_factory):
    """(folder, options) of a whole table."""
    out = tmp_path_factory.mktemp("table") / "out"
    options = ["protocol1", *small, "--second", detector, "--rendered", "--out", out]
    assert gd_eval(*options) == 0
    return out, options


def figures(out):
    return json.loads((out / "figures.json").read_text())


def test_every_method_has_every_group(run):
    found = figures(run[0])
    for prefix in ("", "presence.", "paper_form.", "attention.", "daam.", "daam_best.", "second."):
        assert 0 <= found[f"{prefix}own.oracle.one_seen"] <= 100
        assert f"{prefix}own.split1.oracle.one_seen" in found
    for group in ("one_seen", "one_unseen", "two_seen", "two_mixed"):
        assert f"own.exact.{group}" in found
    assert "daam.own.exact.one_seen" not in found  # it needs the whole generation


def test_figures_of_the_images_themselves(run):
    found = figures(run[0])
    assert found["own.oracle.images"] == 4 * 3 + 3
    assert found["own.exact.images"] == 4 * 3 + 3
    assert 0 < found["own.oracle.accepted"] <= 100
    assert 0 < found["own.oracle.found"] <= 100
    assert found["own.oracle.found_least"] <= found["own.oracle.found"]
    assert found["own.exact.ceiling"] > 80


def test_the_second_detector_sees_what_the_latents_hold(run, model, held_out):
    """Not the image that was rendered, of which the autoencoder has lost the finest lines."""
    example, seen = ExampleSet(held_out)[0], []

    class Watching:
        def detect(self, images, names):
            seen.append(images)
            return [Detection(np.ones((len(row), *images.shape[1:3]), np.bool_), np.ones(len(row))) for row in names]

    (masks,) = DetectorMethod(model, Watching()).look([(0, example)])([example.names])
    latents = torch.from_numpy(example.latents)[None] / model.vae.config.scaling_factor
    with torch.no_grad():
        held = model.vae.decode(latents).sample
    assert np.array_equal(seen[0], to_uint8(held).numpy())
    assert masks.shape == example.masks.shape
    assert "second.own.exact.one_seen" in figures(run[0])


def test_a_pixel_of_two_masks_can_be_left_to_the_surer_object(base, model, held_out):
    """As in the engine's labels. Names beside the image's own overlap with them."""
    example, head = ExampleSet(held_out)[0], untrained_checkpoint(base).head
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    method, names = HeadMethod(model, head), ["dog", "cat", "deer"]
    ask = method.look([(0, example)] * 2)
    (plain, _), method.exclusive = ask([names, names[:1]]), True
    (single, alone) = ask([names, names[:1]])
    assert (plain.sum(0) > 1).any()
    assert single.sum(0).max() == 1
    assert torch.equal(single.any(0), plain.any(0))
    assert not (single & ~plain).any()
    assert torch.equal(alone, ask([names[:1]] * 2)[0])  # rows that fill up a batch take nothing
    assert alone.any()


def test_without_a_second_detector_there_is_no_row_of_it(run, small, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "out")
    (out / "figures.json").unlink()
    assert gd_eval("protocol1", *small, "--methods", "attention", "second", "--out", out) == 0
    assert "attention.own.oracle.one_seen" in figures(out)
    assert not any(name.startswith("second.") for name in figures(out))


def test_absent_names_and_exchanged_masks_are_measured(run):
    found = figures(run[0])
    assert 0 <= found["own.oracle.absent_area"] <= 100
    assert 0 <= found["own.exact.swap_rate"] <= 100
    assert found["presence.own.oracle.absent_area"] <= found["own.oracle.absent_area"]
    assert "daam.own.oracle.absent_area" not in found


def test_the_best_threshold_of_daam_is_at_least_as_good_on_seen_names(run):
    found = figures(run[0])
    score = lambda prefix: sum(found.get(f"{prefix}own.oracle.{group}", 0) for group in ("one_seen", "two_seen"))
    assert score("daam_best.") >= score("daam.")


def test_the_same_command_measures_nothing_twice(run, capsys):
    out, options = run
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()}
    states = {file for file in before if file.name == "figures.json"}
    assert gd_eval(*options) == 0
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.rglob("*") if file.is_file()}
    assert {file: content for file, content in after.items() if file not in states} == {
        file: content for file, content in before.items() if file not in states
    }
    assert "images to measure on" not in capsys.readouterr().out


def test_bad_options_are_told_in_one_line(small, tmp_path, capsys):
    assert gd_eval("protocol1", *small, "--coco", tmp_path / "x.json", "--out", tmp_path) == 2
    assert "--coco needs --images" in capsys.readouterr().err
    assert gd_eval("protocol1", *small, "--split", 1, "--out", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def model(base):
    return FrozenBase(base)


class Truth:
    """A method that says what is true, and of a name that is not there the whole image."""

    any_name = True

    def look(self, batch):
        everything = torch.ones(1, 64, 64, dtype=torch.bool)

        def ask(rows):
            answers = [torch.from_numpy(example.masks) for _, example in batch]
            more = [len(row) > len(example.names) for row, (_, example) in zip(rows, batch, strict=True)]
            return [torch.cat([a, everything]) if m else a for a, m in zip(answers, more, strict=True)]

        return ask


def test_what_is_true_scores_full_marks(held_out):
    found = ExampleSet(held_out)
    images = TestImages("oracle", found, tuple(range(len(found))))
    split = Split(("dog", "cat", "tv monitor"), ("deer",))
    measured = measure(Truth(), images, split, ("dog", "cat", "tv monitor", "deer"))
    scores = [value for name, value in measured.figures.items() if name.endswith(("seen", "mixed"))]
    assert set(scores) == {100.0}
    assert measured.figures["absent_area"] == 100.0
    assert len(measured.scores) == len(found)


def test_detectors_that_disagree_leave_an_image_out(held_out, detector, tmp_path, small):
    from grounded_diffusion.training.detectors.base import Detector
    from grounded_diffusion.training.detectors.open import open_segmenter

    folder = shutil.copytree(held_out, tmp_path / "images")
    names = ("dog", "cat", "tv monitor", "deer")
    same = Detector(open_segmenter(str(detector)), names, score=0)
    alone = oracle_images(folder, None, 0.75)
    assert oracle_images(folder, same, 0.75).kept == alone.kept
    blind = Detector(same.segmenter, names, score=1.0)
    with pytest.raises(Exception, match="none of the 8 images"):
        oracle_images(folder, blind, 0.75)


def test_a_model_without_a_judge_needs_a_detector(base, tmp_path, capsys):
    assert gd_eval("protocol1", "--base", base, "--vocabulary", "voc", "--out", tmp_path / "out") == 2
    assert f"{base} brings no judge; give --detector" in capsys.readouterr().err


def test_scenes_are_as_many_as_asked_with_exact_masks():
    scenes = Scenes(["dog", "cat", "car"], [("dog", "cat")], 2, 3, 32)
    drawn = [tuple(sorted(scenes.labels[k] for k in scenes.read(i)[1])) for i in range(len(scenes))]
    assert sorted(drawn) == [("car",)] * 2 + [("cat",)] * 2 + [("cat", "dog")] * 3 + [("dog",)] * 2
    image, masks = scenes.read(0)
    assert image.size == (32, 32)
    assert all(mask.shape == (32, 32) for mask in masks.values())
    again = Scenes(["dog", "cat", "car"], [("dog", "cat")], 2, 3, 32)
    assert np.array_equal(np.asarray(again.read(0)[0]), np.asarray(image))


def test_latents_are_noised_alike_in_any_batch(model):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, timesteps = noised(latents, model.parts["scheduler"], 121)
    assert timesteps.tolist() == [121.0] * 3
    assert torch.equal(noised(latents[1:2], model.parts["scheduler"], 121)[0][0], whole[1])


def test_daams_recorder_changes_no_output(tiny_checkpoint):
    model = FrozenBase(tiny_checkpoint)
    latents, context = torch.randn(2, 4, 16, 16), model.contexts(["", "a photograph of a dog"])
    plain = model.unet(latents, 1, context).sample
    with recording(model.unet, torch.ones(1, 77, 1)) as recorders:
        recorded = model.unet(latents, 1, context).sample
    assert torch.allclose(recorded, plain, atol=1e-5)
    assert len(recorders) == 6  # two on the way down and four on the way up; not the one of the middle
    for recorder in recorders:
        assert torch.allclose(recorder.sums, torch.ones_like(recorder.sums), atol=1e-5)  # of all words together


def test_a_words_tokens_wherever_it_stands(model):
    weights = word_tokens(model.tokenizer, "a dog and a tv monitor and a dog", ["dog", "tv monitor", "do"], 77)
    assert weights[:, 0].sum() == pytest.approx(1)
    assert (weights[:, 0] > 0).sum() == 2
    assert weights[:, 2].sum() == 0


def test_daam_makes_the_very_images_again(model, held_out, tmp_path):
    """Its last latents are those that the engine had; DAAM keeps maps of names alone."""
    found = ExampleSet(held_out)
    examples = [found[k] for k in range(len(found)) if len(found.names(k)) == 1][:2]
    options = Options(sampler="ddim", steps=3, guidance_scale=5.0, guidance_interval=(0.0, 1.0), seed=9)
    maps = heat_maps(model, examples, [found.key(k) for k in range(2)], options)
    assert maps.shape == (2, 1, 16, 16)
    assert (maps >= 0).all()
    images = TestImages("oracle", found, (0, 1, 2))
    daam = Daam(model, images, options, tmp_path / "maps.npz", 2, lambda line: None)
    again = Daam(model, images, options, tmp_path / "maps.npz", 2, lambda line: None)
    assert all(np.array_equal(again.maps[k], daam.maps[k]) for k in (0, 1, 2))
    low, high = (daam.at(tau).look([(0, found[0])])([found.names(0)])[0] for tau in (0.9, 0.1))
    assert low.sum() < high.sum()


def test_annotated_images_of_other_names_do_not_count(held_out):
    assert len(exact_images(held_out, ("dog",)).kept) < len(ExampleSet(held_out))
