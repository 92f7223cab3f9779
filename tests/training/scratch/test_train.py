"""The trainer: resumable to the bit, configured by a file that is checked, and whole from scenes to checkpoint."""

import json

import pytest
import torch
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.detectors.open import open_segmenter
from grounded_diffusion.training.grounding.loss import grounding_loss
from grounded_diffusion.training.loop import StageConfig, step_generator, train
from grounded_diffusion.training.optim import orthogonalise
from grounded_diffusion.training.scratch.config import load_config
from grounded_diffusion.training.scratch.evaluate import grid_ceiling, pooled_iou
from grounded_diffusion.training.scratch.head import absent_names, draw_prompts, object_masks
from grounded_diffusion.training.scratch.unet import build_tokenizer
from grounded_diffusion.training.things.world import WORDS

TINY = """
latents = 64
examples = 64
names = ["dog", "cat", "bus", "cactus"]
unseen = ["cactus"]
[world]
size = 32
[vae]
block_out_channels = [8, 16, 16]
[text]
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 1
[unet]
block_out_channels = [16, 32, 32]
norm_num_groups = 8
attention_head_dim = 2
[head]
embed_dim = 32
heads = 2
layers = 1
ffn_dim = 32
patch = 1
reduced_channels = [8, 8, 16]
[stages.vae]
steps = 2
batch = 4
[stages.unet]
steps = 2
batch = 4
ema = 0.9
[stages.oracle]
steps = 2
batch = 4
[stages.labeller]
steps = 2
batch = 4
[stages.judge]
steps = 2
batch = 4
[stages.head]
steps = 2
batch = 4
"""


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def run(folder, stops):
        for steps in stops:
            torch.manual_seed(0)
            module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
            stage = StageConfig(steps=steps, cooldown=1e-9, ema=0.9, save_every=2, muon_lr=0.02)

            def loss(step, generator, module=module):
                x = torch.randn(8, 16, generator=generator)
                return F.mse_loss(module(x), x)

            average = train("toy", module, stage, folder, loss)
        return module.state_dict(), average.state_dict()

    whole, parts = run(tmp_path / "a", [6]), run(tmp_path / "b", [2, 4, 6])
    for a, b in zip(whole, parts, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(whole[0]["0.weight"], whole[1]["0.weight"])


def test_muon_updates_are_nearly_orthogonal():
    for shape in ((32, 96), (96, 32), (64, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=step_generator(0, 0))))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_the_rate_warms_up_holds_and_cools_down():
    stage = StageConfig(steps=100, warmup=10, cooldown=0.5)
    assert stage.rate(0) == pytest.approx(0.1)
    assert stage.rate(30) == 1
    assert stage.rate(75) == pytest.approx(0.5)


def test_configurations_are_checked(tmp_path):
    file = tmp_path / "run.toml"
    for text, message in {
        "[world]\nsise = 3": r"unknown option sise in \[world\]",
        "[stages.vae]\nsteps = 0": "steps is 0",
        'names = ["unicorn"]': "no sprite is known for unicorn",
        '[init]\nhead = "x"': r"unknown part head in \[init\]",
        '[init]\nunet = "nowhere"': "init.unet is nowhere, which holds no unet",
        "[world]\nviews = -1": "counts",
        "latents = ": "is not TOML",
    }.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_config(file)
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path / "absent.toml")


def test_every_word_of_the_world_is_one_token():
    tokenizer = build_tokenizer()
    for word in [*" ".join(WORDS).split(), "photograph", "background"]:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.decode(tokenizer("a zeppelin, naïve").input_ids, skip_special_tokens=True) == "a zeppelin , naïve"


def test_zero_masks_are_left_out_of_the_loss_but_an_absent_names_is_not():
    logits = torch.tensor([2.0, -1.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    masks = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    term = lambda o: F.binary_cross_entropy_with_logits(logits[:, o], masks[:, o].float())
    absent = torch.tensor([[0.0, 0.0, 0.5]])
    assert grounding_loss(logits, masks).item() == pytest.approx(term(0).item())
    assert grounding_loss(logits, masks, absent).item() == pytest.approx((term(0) + term(2) / 2).item() / 1.5)
    assert grounding_loss(logits, torch.zeros_like(masks)).item() == 0


def test_an_absent_name_is_none_of_the_image():
    objects = torch.tensor([[0, -1], [1, 2], [2, 0]]).repeat(40, 1)
    absent = absent_names(objects, 4, step_generator(0, 0))
    assert (absent != objects).all()
    assert set(absent.flatten().tolist()) == {0, 1, 2, 3}


def test_prompts_name_one_or_two_different_seen_names():
    texts, objects = draw_prompts(["dog", "cat", "bus"], 50, step_generator(0, 0))
    assert (objects[:, 0] != objects[:, 1]).all()
    assert {(o >= 0).sum().item() for o in objects} == {1, 2}
    assert all(text.count("a ") - 1 == (row >= 0).sum() for text, row in zip(texts, objects, strict=True))
    classes = torch.tensor([[[0, 1], [2, 2]]])
    assert object_masks(classes, torch.tensor([[1, -1]])).tolist() == [[[[0, 0], [1, 1]], [[0, 0], [0, 0]]]]


def test_iou_pools_counts_and_the_ceiling_rises_with_the_grid():
    truth = torch.zeros(2, 32, 32, dtype=torch.bool)
    truth[:, 3:21, 5:9] = True
    half = truth & (torch.arange(32) < 7)
    assert pooled_iou(half, truth, torch.tensor([0, 0]), 2)[0] == 0.5
    assert grid_ceiling(truth, 4) < grid_ceiling(truth, 8) < grid_ceiling(truth, 32) <= 1


def test_all_stages_from_scenes_to_checkpoint(tmp_path, capsys):
    config, run, out = tmp_path / "tiny.toml", tmp_path / "run", tmp_path / "tiny"
    config.write_text(TINY)
    for stage in ("base", "oracle", "judge", "head", "evaluate", "pack"):
        options = ["--out", str(out)] if stage == "pack" else []
        assert cli.main([stage, "--config", str(config), "--run", str(run), *options]) == 0
    assert not any(str(tmp_path) in file.read_text() for file in out.rglob("*.json"))
    checkpoint = load_checkpoint(out)
    assert checkpoint.names == {"seen": ["dog", "cat", "bus"], "unseen": ["cactus"]}
    assert checkpoint.capture_timestep == 1
    assert json.loads((out / "evaluation.json").read_text())["one"]["images"] == 48
    assert "found by the oracle" in (out / "README.md").read_text()
    assert (run / "unet.state.pt").exists()
    assert "both found" in (told := capsys.readouterr().out) and "judge: mIoU" in told
    labels = open_segmenter(str(run / "judge" / "network")).labels
    assert list(labels.values()) == ["background", "dog", "cat", "bus", "cactus"]


def test_a_text_encoder_too_narrow_for_meanings_is_refused(tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.replace("hidden_size = 64", "hidden_size = 32"))
    assert cli.main(["base", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "text.hidden_size is 32" in capsys.readouterr().err


def test_stages_out_of_order_say_what_is_missing(tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    assert cli.main(["head", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "train it with gd-train base" in capsys.readouterr().err
