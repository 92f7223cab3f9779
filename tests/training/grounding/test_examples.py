"""Examples: even prompts, whole shards, masks made again, and the same bytes however often it was killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.examples import Outcome, table
from grounded_diffusion.training.grounding.prompts import draw_prompts
from grounded_diffusion.training.grounding.splits import UNSEEN, built_in_split
from grounded_diffusion.training.grounding.store import ExampleSet, read_about, yields
from grounded_diffusion.training.head.taps import Taps


def gd_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


def content(folder):
    """Every file but locks, by path."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_every_name_and_pair_gets_its_share():
    prompts = draw_prompts(["dog", "cat", "bus"], [("dog", "cat"), ("cat", "bus")], 60, pair_share=0.4)
    counts = Counter(prompt.objects for prompt in prompts)
    assert {names: n for names, n in counts.items() if len(names) == 1} == {("dog",): 12, ("cat",): 12, ("bus",): 12}
    assert counts["dog", "cat"] == counts["cat", "bus"] == 12
    assert {len(prompt.objects) for prompt in prompts[:12]} == {1, 2}
    assert prompts[0].text.startswith("a photograph of a ")


def test_prompts_hang_on_the_seed_alone():
    draw = lambda seed: [prompt.text for prompt in draw_prompts(["dog", "cat", "bus"], [], 30, seed=seed)]
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert sorted(draw(0)) == sorted(draw(1))


def test_templates_are_spread():
    templates = (["a {}", "one {}"], [])
    texts = Counter(prompt.text for prompt in draw_prompts(["dog"], [], 10, templates=templates))
    assert texts == {"a dog": 5, "one dog": 5}
    with pytest.raises(UsageError, match="no template"):
        draw_prompts(["dog", "cat"], [("dog", "cat")], 10, templates=templates)


@pytest.mark.parametrize(("vocabulary", "seen", "unseen"), [("voc", 15, 5), ("coco", 65, 14)])
def test_splits_have_the_papers_sizes(vocabulary, seen, unseen):
    for number in (1, 2, 3):
        split = built_in_split(vocabulary, number)
        assert (len(split.seen), len(split.unseen)) == (seen, unseen)
        assert all(set(pair) <= set(split.seen) for pair in split.seen_pairs)
    assert len({name for names in UNSEEN[vocabulary] for name in names}) == 3 * unseen


def test_no_split_of_that_number():
    with pytest.raises(UsageError, match="has the splits 1 to 3, not 4"):
        built_in_split("voc", 4)


def test_the_known_part_of_a_split_has_its_spelling():
    split = built_in_split("coco", 3).among(["sofa", "person", "tv monitor", "cat", "dragon"])
    assert (split.seen, split.unseen) == (("person", "cat"), ("sofa", "tv monitor"))
    assert ("sofa", "tv monitor") in split.pairs
    assert {name for pair in split.pairs for name in pair} <= {"sofa", "person", "tv monitor", "cat"}
    with pytest.raises(UsageError, match="no name is left"):
        built_in_split("coco", 3).among(["dragon"])


def test_examples_say_what_they_are(examples, base):
    about = read_about(open_storage(str(examples)))
    assert about.seen == ("dog", "cat", "tv monitor")
    assert about.unseen == ("deer",)
    assert about.base == FrozenBase(base).digest
    found = ExampleSet(examples)
    assert len(found) == 24
    assert {name for k in range(24) for name in found.names(k)} == set(about.seen)
    assert found.detectors[0]["labels"]["tv monitor"] == ["tv"]


def test_the_latent_gives_the_features_back(examples, base, base_bundle):
    """One UNet call in torch on what was kept sees what the engine's network saw at the captured step."""
    from grounded_diffusion.engine import GroundedPipeline, Options

    model, found = FrozenBase(base), ExampleSet(examples)
    example = found[0]
    row = json.loads((examples / "shards/000000.json").read_text())["rows"][0]
    pipe = GroundedPipeline.open(base_bundle, threads=1)
    options = Options(sampler="ddim", steps=3, guidance_scale=5.0, guidance_interval=(0.0, 1.0))
    prompt = json.dumps({"prompt": row["prompt"], "objects": list(example.names), "seed": row["seed"]})
    noise = None
    if row["draw"]:
        from grounded_diffusion.engine.sampling.noise import normal

        noise = normal(row["seed"], row["draw"], example.latents.shape)[None]
    sample = next(iter(pipe.generate([prompt], options, noise=noise)))
    assert np.allclose(sample.captured_latents, example.latents, atol=1e-4)
    from grounded_diffusion.training.checkpoint import untrained_checkpoint

    head = untrained_checkpoint(base).head
    latents, timestep = torch.from_numpy(example.latents)[None], torch.tensor([example.timestep])
    with Taps(model.unet) as taps, torch.no_grad():
        features = model.features(latents, [example.prompt], timestep, taps)
        logits = head(features, model.queries(example.names)[None], torch.ones(1, len(example.names), dtype=torch.bool))
    assert np.allclose(logits[0].numpy(), sample.mask_logits, atol=2e-3 * np.abs(sample.mask_logits).max())


def test_zero_masks_are_counted_not_dropped(example_options, tmp_path, capsys):
    assert gd_train("examples", *example_options, "--score", 1, "--out", tmp_path / "none") == 0
    counts = yields(open_storage(str(tmp_path / "none")), range(3))
    assert sum(count["zero"] for count in counts.values()) == sum(count["images"] for count in counts.values())
    assert len(ExampleSet(tmp_path / "none")) == 24
    assert "zero" in capsys.readouterr().out


def test_the_read_out_says_what_a_mask_has_cost():
    names = {"dog": {"images": 10, "found": 4, "zero": 6}, "emu": {"images": 3, "found": 0, "zero": 3}}
    assert table(Outcome(names, 0.2)).splitlines() == [
        "     images   found    zero   s/mask",
        "dog      10       4       6     0.50",
        "emu       3       0       3",
    ]
    assert table(Outcome(names, None)).splitlines()[1] == "dog      10       4       6"


def test_a_damaged_shard_is_made_again(example_options, examples, tmp_path, capsys):
    out = shutil.copytree(examples, tmp_path / "damaged")
    for name in ("latents/000001.npy", "masks/000002.npy"):
        with (out / name).open("r+b") as stream:
            stream.seek(200)
            stream.write(b"\xff\xff\xff")
    with pytest.raises(UsageError, match=r"latents/000001.npy is damaged; run gd-train examples again"):
        ExampleSet(out)
    assert gd_train("examples", *example_options, "--out", out) == 0
    assert "latents/000001.npy is damaged; the shard is made again" in capsys.readouterr().out
    assert content(out) == content(examples)


def test_masks_of_another_detector_are_refused(example_options, examples, tmp_path, capsys):
    out = shutil.copytree(examples, tmp_path / "other")
    assert gd_train("examples", *example_options, "--score", 0.5, "--out", out) == 2
    error = capsys.readouterr().err
    assert "masks of another detector (score differ)" in error
    shutil.rmtree(out / "masks")
    assert gd_train("examples", *example_options, "--score", 0.5, "--out", out) == 0


def test_what_the_detector_cannot_do_is_told_before_anything_is_made(example_options, words, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\nzebras\n")
    options = [option for option in example_options if option not in words]
    assert gd_train("examples", *options, "--names", names, "--out", tmp_path / "out") == 2
    assert "does not know 'zebras' (nearest labels: zebra" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_killed_command_goes_on_to_the_same_bytes(example_options, examples, tmp_path):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "grounded_diffusion.training.cli",
        "examples",
        *map(str, example_options),
        "--out",
        str(out),
    ]
    dice = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stages = [out / "run.json", out / "shards/000001.json", out / "masks/000000.json"]
        wanted, ends = dice.choice(stages), time.monotonic() + 60
        while process.poll() is None and not wanted.exists() and time.monotonic() < ends:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert gd_train("examples", *example_options, "--out", out) == 0
    assert content(out) == content(examples)


@pytest.mark.slow
def test_twenty_kills_at_any_moment(example_options, examples, tmp_path):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "grounded_diffusion.training.cli",
        "examples",
        *map(str, example_options),
        "--out",
        str(out),
    ]
    dice, kills = random.Random(1), 0
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        while not out.exists() and process.poll() is None and time.monotonic() - began < 120:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 8))
        if process.poll() is not None:  # it was done before it could be killed: begin anew
            assert content(out) == content(examples)
            shutil.rmtree(out)
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert gd_train("examples", *example_options, "--out", out) == 0
    assert content(out) == content(examples)
