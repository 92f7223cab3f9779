"""A student of few steps: its schedule, its change as a LoRA file, and the whole command on a small random model."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.pipeline.shipped import shipped_checkpoint
from grounded_diffusion.engine.sampling.schedule import build_schedule
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.distill.low_rank import add_changes, save_changes
from grounded_diffusion.training.distill.student import Student, StudentConfig
from grounded_diffusion.training.distill.trajectories import FOLDER, Teaching, read
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.generator.lora import fuse
from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.loop import StageConfig

TRAIN = ["--timesteps", "999,600,200", "--substeps", 2, "--rank", 4, "--batch", 4, "--iterations", 24, "--lr", 0.01]


def gd_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a photograph of a [dog]\na photograph of a [cat]\n" * 20)
    return path


@pytest.fixture(scope="module")
def options(base, base_bundle, prompts):
    return ["distill", "--base", base, "--model", base_bundle, "--prompts", prompts, "--threads", 1, *TRAIN]


@pytest.fixture(scope="module")
def student(options, tmp_path_factory):
    """A trained student. Do not write to it."""
    out = tmp_path_factory.mktemp("student") / "out"
    assert gd_train(*options, "--out", out) == 0
    return out


def test_the_teacher_steps_between_the_students():
    assert Teaching((900, 600, 300), 3).teacher_timesteps == [900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert Teaching((999, 130), 1).teacher_timesteps == [999, 130]
    for timesteps in ((300, 600), (600, 600), (600, 1)):
        with pytest.raises(UsageError, match="do not fall by 3 and more"):
            Teaching(timesteps, 3)


def test_a_schedule_given_whole_is_that_of_the_same_spacing():
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    given = {**config, "timesteps": [999, 749, 499, 249]}
    for sampler in ("ddim", "dpmpp-2m"):
        assert build_schedule(given, sampler, 4).rows == build_schedule(config, sampler, 4).rows


@pytest.mark.parametrize("timesteps", [[1000, 3], [3, 9], [5, 5], [], "999", [True], [9.0]])
def test_timesteps_that_are_none_are_refused(timesteps):
    with pytest.raises(UsageError, match="must be whole numbers below 1000, falling"):
        build_schedule({"timesteps": timesteps}, "ddim", 2)


def test_another_number_of_steps_than_given_is_refused():
    with pytest.raises(UsageError, match="given whole, 2 steps; 20 cannot be had"):
        build_schedule({"timesteps": [999, 400]}, "ddim", 20)


def test_a_change_is_none_at_first_and_a_lora_file_later(base, tmp_path):
    changed, plain = load_base(base), load_base(base)
    given = torch.randn(1, 4, 16, 16), torch.tensor(500), torch.randn(1, 77, 32)
    run = lambda parts: parts["unet"](*given, return_dict=False)[0]
    with torch.no_grad():
        before = run(plain)
        changes = add_changes(changed["unet"], 2)
        assert torch.equal(run(changed), before)
        for change in changes.values():
            change.up.normal_(std=0.02)
            change.up.copy_(change.up.half())
            change.down.copy_(change.down.half())
        after = run(changed)
        assert (after - before).abs().max() > 0.01
        save_changes(changes, tmp_path / "change.safetensors", {})
        fuse(tmp_path / "change.safetensors", 1.0, plain)
        assert torch.allclose(run(plain), after, atol=1e-5)


def test_the_student_comes_nearer_to_its_teacher(student):
    lines = (student / "student.json").read_text()
    measured = json.loads(lines)
    assert measured["error"] < 0.9 * measured["untrained"]
    with safe_open(student / "student.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt", "sampler": "ddim", "timesteps": "999,600,200", "guidance_scale": "1"
        }  # fmt: skip


def test_a_bundle_of_the_student_runs_as_the_student_does(student, base, base_bundle, tmp_path):
    """gd-export --lora takes the schedule with the weights; the engine then ends where the student in torch does."""
    from grounded_diffusion.export import cli as export

    given = ["--base", base, "--head", "untrained", "--lora", student / "student.safetensors", "--no-verify"]
    assert export.main([*map(str, given), "--out", str(tmp_path / "bundle")]) == 0
    noise = np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32)
    texts = ["a photograph of a dog", "a photograph of a cat"]
    with GroundedPipeline.open(tmp_path / "bundle", threads=1) as pipe:
        samples = list(pipe.generate(["a photograph of a [dog]", "a photograph of a [cat]"], noise=noise))
        assert [round(s.capture_timestep) for s in samples] == [200, 200]
    config = StudentConfig(StageConfig(), rank=4)
    learner = Student(FrozenBase(base), (999, 600, 200), config)
    tensors = load_file(student / "student.safetensors")
    for name, change in learner.changes.items():
        for half, letter in (("down", "A"), ("up", "B")):
            getattr(change, half).data = tensors[f"unet.{name.replace('/', '.')}.lora_{letter}.weight"].float()
    made = learner.sample(torch.from_numpy(noise), texts)
    for sample, latents in zip(samples, made, strict=True):
        assert np.allclose(sample.latents, latents.numpy(), atol=1e-3)


def test_a_stopped_run_goes_on_to_the_same_student(student, options, tmp_path):
    assert gd_train(*options, "--out", tmp_path, "--iterations", 10) == 0
    file = tmp_path / FOLDER / "000000.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert read(file, 40) is None
    assert gd_train(*options, "--out", tmp_path) == 0
    assert file.read_bytes() == whole
    made, expected = (np.load(folder / FOLDER / "000000.npz")["latents"] for folder in (tmp_path, student))
    assert made.shape == (40, 4, 4, 16, 16)
    assert np.array_equal(made, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--guidance-scale", 3], "trajectories with another guidance_scale"),
        (["--timesteps", "999,500"], "trajectories with another timesteps"),
        (["--timesteps", "a"], "must be whole numbers with commas"),
        (["--rank", 0], "rank is 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(student, options, changed, message, capsys):
    assert gd_train(*options, *changed, "--out", student) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_the_shipped_student_says_how_it_is_run():
    shipped = shipped_checkpoint()
    parts = load_base(shipped, loras=[(shipped / "student.safetensors", 1.0)])
    assert parts["sampling"].items() >= {"sampler": "ddim", "steps": 4, "guidance_scale": 1.0}.items()
    assert parts["scheduler"].config["timesteps"] == [999, 700, 400, 130]
    plain = load_base(shipped)["unet"].conv_in.weight
    assert not torch.equal(parts["unet"].conv_in.weight, plain)
