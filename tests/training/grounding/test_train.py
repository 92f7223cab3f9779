"""Training of a head: settings, batches, the loss, resuming to the bit, and what cannot be trained on."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import train_losses

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import Pool, collate, renoise, share
from grounded_diffusion.training.grounding.config import PRESETS, HeadTraining, build
from grounded_diffusion.training.grounding.head import hold_back
from grounded_diffusion.training.grounding.loss import object_losses, term_weights
from grounded_diffusion.training.grounding.store import Example, ExampleSet
from grounded_diffusion.training.grounding.train import HeadTrainer
from grounded_diffusion.training.grounding.validate import Validation
from grounded_diffusion.training.metrics import PooledIoU

SIZES = dict(embed_dim=32, heads=2, ffn_dim=32, patch=2, reduced_channels=[8, 16])
SMALL = dict(batch=4, validate_every=0, save_every=2, head=SIZES)


def gd_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(base):
    return FrozenBase(base)


def train(model, examples, folder, iterations, most=None, **changes):
    """(trainer, losses) of a training on one process, on at most so many examples."""
    from accelerate import Accelerator

    losses = []
    config = HeadTraining(**{**SMALL, "iterations": iterations, **changes})
    log = lambda step, values: losses.append(values.get("loss"))
    pool = Pool([ExampleSet(examples)])
    pool.places = pool.places[:most]
    trainer = HeadTrainer(model, pool, config, folder, None, Accelerator(cpu=True), log=log)
    trainer.run()
    return trainer, losses


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "muon", "noise_range": 100, "clip": 1.0}, {"head": {**SIZES, "attention": True}}],
)
def test_a_resumed_training_equals_an_uninterrupted_one(model, examples, tmp_path, changes):
    whole, losses = train(model, examples, tmp_path / "whole", 5, **changes)
    first, before = train(model, examples, tmp_path / "parts", 2, **changes)
    again, after = train(model, examples, tmp_path / "parts", 5, **changes)
    assert before + after == losses
    ours, theirs = again.head.state_dict(), whole.head.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(first.head.state_dict()["to_q.weight"], ours["to_q.weight"])


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_moves_nothing_but_the_head(model, examples, tmp_path, variant, precision):
    before = model.unet.conv_in.weight.clone()
    changes = dict(
        lr=3e-3, batch=2, save_every=1000, head={**SIZES, "variant": variant}, precision=precision, zero_masks="trust"
    )
    trainer, losses = train(model, examples, tmp_path / "run", 30, most=2, **changes)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert torch.equal(model.unet.conv_in.weight, before)
    assert all(p.grad is None for p in model.unet.parameters())
    assert trainer.head.config.variant == variant


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_head_that_reads_attention_keeps_the_models_keys(model, examples, tmp_path, optimizer):
    trainer, _ = train(
        model, examples, tmp_path, 4, optimizer=optimizer, weight_decay=0.1, head={**SIZES, "attention": True}
    )
    evidence = trainer.head.evidence
    for to_k, (name, _, _) in zip(evidence.to_k, evidence.layers, strict=True):
        assert torch.equal(to_k.weight, model.unet.get_submodule(name).to_k.weight)
    assert torch.equal(evidence.template, model.template_states())
    assert evidence.looks.weight.abs().max() > 0  # it starts at zero


def test_other_settings_are_refused_by_name(model, examples, tmp_path):
    train(model, examples, tmp_path, 2)
    with pytest.raises(UsageError, match=r"a run with other settings \(lr\)"):
        train(model, examples, tmp_path, 4, lr=1e-3)


def test_a_damaged_state_is_told(model, examples, tmp_path):
    train(model, examples, tmp_path, 2)
    (tmp_path / "state.pt").write_bytes(b"x" * 100)
    with pytest.raises(Exception, match=r"state\.pt is damaged"):
        train(model, examples, tmp_path, 4)


def test_steps_without_a_mask_are_left_out(model, examples, example_options, tmp_path):
    out = shutil.copytree(examples, tmp_path / "zero")
    shutil.rmtree(out / "masks")
    assert gd_train("examples", *example_options, "--score", 1, "--out", out) == 0
    trainer, losses = train(model, out, tmp_path / "run", 3)
    assert losses == []
    assert trainer.step == 3
    _, losses = train(model, out, tmp_path / "trust", 3, zero_masks="trust")
    assert len(losses) == 3


def test_zero_masks_are_skipped_or_trusted():
    masks = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    masks[0, 0] = True
    valid = torch.tensor([[True, True, False]])
    assert term_weights(masks, valid, "skip").tolist() == [[1, 0, 0]]
    assert term_weights(masks, valid, "trust").tolist() == [[1, 1, 0]]
    losses = object_losses(torch.zeros(1, 3, 2, 2), masks)
    assert losses.tolist() == [[pytest.approx(np.log(2), rel=1e-6)] * 3]


def test_presets_files_and_options(tmp_path):
    paper = PRESETS["paper"]
    assert (paper.lr, paper.weight_decay, paper.batch, paper.iterations) == (1e-4, 1e-4, 8, 5000)
    released = PRESETS["released"]
    assert (released.lr, released.weight_decay, released.batch, released.loss) == (1e-5, 0, 1, "sum")
    file = tmp_path / "head.toml"
    file.write_text("lr = 0.5\nbatch = 3\n[head]\npatch = 1\n")
    config = build("paper", file, {"batch": 5}, "paper")
    assert (config.lr, config.batch, config.head) == (0.5, 5, {"patch": 1, "variant": "paper"})
    for text, message in {"rate = 1": "unknown settings rate", "lr = ": "not TOML", "batch = 0": "batch is 0"}.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            build("paper", file)


def test_the_rate_warms_up_and_cools_down():
    config = HeadTraining(iterations=100, warmup=10, cooldown=0.5)
    assert [config.rate(step) for step in (0, 9, 40)] == [pytest.approx(0.1), 1, 1]
    assert config.rate(75) == pytest.approx(0.5)
    assert HeadTraining().rate(4999) == 1


def example(names, seed=0):
    rng = np.random.default_rng(seed)
    masks = rng.random((len(names), 8, 8)) > 0.5
    return Example("a", tuple(names), rng.normal(size=(4, 2, 2)).astype(np.float32), 1.0, masks)


def test_processes_share_the_very_batch():
    batch = collate(
        [example(["dog"], k) for k in range(4)] + [example(["cat", "dog"], k) for k in range(4)], {"dog": 0, "cat": 1}
    )
    parts = [share(batch, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert torch.equal(torch.cat([part.masks for part in parts]), batch.masks)
    assert batch.valid.sum(1).tolist() == [1] * 4 + [2] * 4
    assert batch.names[-1].tolist() == [1, 0]


def test_half_of_the_examples_are_noised(model):
    batch = collate([example(["dog"])] * 200, {"dog": 0})
    noisy = renoise(batch, model.parts["scheduler"], 300, torch.Generator().manual_seed(0))
    kept = noisy.timesteps == 1.0
    assert 70 < kept.sum() < 130
    assert torch.equal(noisy.latents[kept], batch.latents[kept])
    assert noisy.timesteps.max() <= 300
    assert (noisy.latents[~kept] != batch.latents[~kept]).any()


def test_a_tenth_at_most_is_held_back():
    rest, kept = hold_back(100, HeadTraining(validation=256))
    assert len(kept) == 10
    assert sorted(rest + kept) == list(range(100))
    assert hold_back(100, HeadTraining(validate_every=0))[1] == []


def test_iou_is_pooled_by_name():
    pooled = PooledIoU()
    full, half = torch.ones(4, 4, dtype=torch.bool), torch.arange(16).view(4, 4) < 8
    pooled.add("dog", half, full)
    pooled.add("dog", full, full)
    pooled.add("cat", half, half)
    assert pooled.by_name() == {"dog": 24 / 32, "cat": 1.0}
    assert pooled.mean() == pytest.approx((0.75 + 1) / 2)
    assert pooled.mean(["dog"]) == 0.75
    assert pooled.mean(["bus"]) is None


def test_validation_tells_seen_from_unseen(model, held_out):
    from grounded_diffusion.training.checkpoint import untrained_checkpoint
    from grounded_diffusion.training.head.taps import Taps

    found, head = ExampleSet(held_out), untrained_checkpoint(model.source).head
    validation = Validation(model, [found[k] for k in range(len(found))], ["dog", "cat", "tv monitor"])
    with Taps(model.unet) as taps:
        measured = validation.measure(head, taps)
    assert set(measured.by_name) <= {"dog", "cat", "tv monitor", "deer"}
    if "deer" in measured.by_name:
        assert measured.unseen == measured.by_name["deer"]
    assert "mIoU" in measured.line()


def test_examples_of_another_model_are_refused(examples, base, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(base, tmp_path / "other")
    file = next((other / "unet").glob("*.safetensors"))
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file, {"format": "pt"})
    assert gd_train("head", "--base", other, "--examples", examples, "--out", tmp_path / "out", "--device", "cpu") == 2
    assert "was made by another model" in capsys.readouterr().err


def test_what_is_no_base_or_no_examples(examples, base, tmp_path, capsys):
    options = ["--out", tmp_path / "out", "--device", "cpu"]
    assert gd_train("head", "--base", tmp_path, "--examples", examples, *options) == 2
    assert "has no model_index.json" in capsys.readouterr().err
    assert gd_train("head", "--base", base, "--examples", tmp_path, *options) == 2
    assert "has no finished examples" in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("mine")
    assert gd_train("head", "--base", base, "--examples", examples, "--out", tmp_path, "--device", "cpu") == 2
    assert "was not written by gd-train head" in capsys.readouterr().err


def test_a_copy_in_half_precision_is_the_same_model(model, tmp_path):
    from grounded_diffusion.training.checkpoint import save_checkpoint, untrained_checkpoint

    save_checkpoint(tmp_path / "copy", untrained_checkpoint(model.source))
    assert FrozenBase(tmp_path / "copy").digest == model.digest
    assert len(json.dumps(model.digest)) == 66


def test_two_processes_give_the_losses_of_one_with_the_whole_batch(base, examples, tmp_path):
    """Gloo on this machine; each process has half of the batch. The sums are added in another order: 1e-4."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, train_losses.__file__, base, examples, tmp_path / f"run-{processes}", out]
        running = []
        for rank in range(processes):
            shared = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            env = os.environ | ({key: str(value) for key, value in shared.items()} if processes > 1 else {})
            running.append(subprocess.Popen([str(word) for word in command], env={**env, "ACCELERATE_USE_CPU": "1"}))
        assert [process.wait(timeout=300) for process in running] == [0] * processes
        results.append(json.loads(out.read_text()))
    assert [result["processes"] for result in results] == [1, 2]
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], rel=1e-4)
    assert results[0]["losses"][-1] != results[0]["losses"][0]
