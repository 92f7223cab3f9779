"""The trainer: resumable to the bit, configured by a file that is checked, and whole from scenes to checkpoint."""

import pytest
import torch
from helpers.scratch import SIZES
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.detectors.open import open_segmenter
from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.loop import StageConfig, step_generator, train
from grounded_diffusion.training.optim import orthogonalise
from grounded_diffusion.training.scratch.config import load_config
from grounded_diffusion.training.scratch.unet import build_tokenizer
from grounded_diffusion.training.things.world import WORDS

TINY = f"""
latents = 64
names = ["dog", "cat", "bus", "cactus"]
{SIZES}
[stages.vae]
steps = 2
batch = 4
[stages.unet]
steps = 2
batch = 4
ema = 0.9
[stages.labeller]
steps = 2
batch = 4
[stages.judge]
steps = 2
batch = 4
"""

HEAD = """
batch = 4
validate_every = 0
[head]
embed_dim = 32
heads = 2
layers = 1
ffn_dim = 32
patch = 1
reduced_channels = [8, 8, 16]
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


def test_from_scenes_to_a_grounded_model(tmp_path, capsys):
    """The base model and its segmenters from scratch, and what gd-train does with them as with anybody's."""
    config, run = tmp_path / "tiny.toml", tmp_path / "run"
    config.write_text(TINY)
    train = lambda *words: cli.main([str(word) for word in words])
    for stage in ("base", "labeller", "judge"):
        assert train(stage, "--config", config, "--run", run, "--threads", 1) == 0
    assert (run / "unet.state.pt").exists()
    told = capsys.readouterr().out
    assert "labeller: mIoU" in told
    assert "judge: mIoU" in told
    assert load_base(run)["sampling"]["steps"] == 8
    labels = open_segmenter(str(run / "judge" / "network")).labels
    assert list(labels.values()) == ["background", "dog", "cat", "bus", "cactus"]

    (tmp_path / "names.txt").write_text("dog\ncat\nbus\n")
    names = ("--names", tmp_path / "names.txt")
    assert train("real", "--base", run, "--rendered", 12, *names, "--out", tmp_path / "scenes") == 0
    (tmp_path / "head.toml").write_text(HEAD)
    given = ("--examples", tmp_path / "scenes", "--config", tmp_path / "head.toml", "--iterations", 2)
    assert train("head", "--base", run, *given, "--device", "cpu", "--out", tmp_path / "checkpoint") == 0
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.names == {"seen": ["bus", "cat", "dog"], "unseen": []}
    assert checkpoint.sampling["sampler"] == "dpmpp-2m"
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "checkpoint").glob("*/*.json"))


def test_a_text_encoder_too_narrow_for_meanings_is_refused(tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.replace("hidden_size = 64", "hidden_size = 32"))
    assert cli.main(["base", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "text.hidden_size is 32" in capsys.readouterr().err


def test_stages_out_of_order_say_what_is_missing(tmp_path, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(TINY)
    assert cli.main(["judge", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "train it with gd-train base" in capsys.readouterr().err
