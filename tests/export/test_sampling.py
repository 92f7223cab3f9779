"""How a bundle's runs draw where their own options say nothing."""

import json
import shutil
from dataclasses import replace

import pytest
from diffusers import EulerDiscreteScheduler, LCMScheduler
from helpers.families import tiny_parts
from helpers.tiny import tiny_model

from grounded_diffusion.bundle import open_bundle, read_manifest, write_manifest
from grounded_diffusion.engine import Options
from grounded_diffusion.engine.cli import infer
from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.export import cli
from grounded_diffusion.export.bundle import own_sampling
from grounded_diffusion.training.checkpoint import Checkpoint, load_checkpoint
from grounded_diffusion.training.generator.model import read_sampling

FAST = {"sampler": "dpmpp-2m", "steps": 20, "guidance_scale": 7.5, "guidance_interval": (0.0, 0.6)}


@pytest.mark.parametrize(
    ("family", "said"),
    [("sd1", ("ddim", 50, 7.5)), ("sd-turbo", ("euler", 1, 1.0)), ("sdxl", ("euler", 50, 5.0))],
)
def test_families_have_what_their_cards_say(family, said):
    own = own_sampling(Checkpoint(**tiny_parts(family), head=None, family=family))
    assert own == dict(zip(("sampler", "steps", "guidance_scale"), said, strict=True)) | {"guidance_interval": (0, 1)}


def test_a_checkpoint_says_its_own(tiny_checkpoint):
    assert own_sampling(load_checkpoint(tiny_checkpoint)) == FAST


def test_another_scheduler_is_another_sampler():
    model = replace(tiny_model(), sampling={"steps": 4})
    model = replace(model, scheduler=LCMScheduler.from_config(model.scheduler.config))
    assert (own_sampling(model)["sampler"], own_sampling(model)["steps"]) == ("lcm", 4)


def test_what_the_scheduler_does_not_allow_is_refused_at_export():
    model = replace(tiny_model(), sampling={})
    model = replace(model, scheduler=EulerDiscreteScheduler.from_config(model.scheduler.config, use_karras_sigmas=True))
    with pytest.raises(UsageError, match=r"use_karras_sigmas.*--sampler"):
        own_sampling(model)
    assert own_sampling(replace(model, sampling={"sampler": "ddim"}))["sampler"] == "ddim"


def test_options_of_the_export_go_first(tiny_checkpoint, tmp_path):
    given = "--out x --sampler lcm --steps 4 --guidance-scale 0 --guidance-interval 0 1 --spacing trailing"
    args = cli.parse(["--ckpt", str(tiny_checkpoint), *given.split()])
    model = cli.with_sampling(load_checkpoint(tiny_checkpoint), args)
    assert own_sampling(model) == {
        "sampler": "lcm", "steps": 4, "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0)
    }  # fmt: skip
    assert model.scheduler.config.timestep_spacing == "trailing"
    with pytest.raises(UsageError, match="a --bundle says it already"):
        cli.parse(["--bundle", "b", "--engine", "tensorrt", "--steps", "4"])


def test_a_run_takes_them_and_says_so(tiny_bundle, tmp_path):
    own = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    sampling = {"sampler": "euler", "steps": 2, "guidance_scale": 1.0}
    write_manifest(own, replace(read_manifest(tiny_bundle), sampling=sampling))
    base = ["--model", str(own), "--prompt", "a [dog]", "--batch", "1"]
    assert infer.main([*base, "--out", str(tmp_path / "out")]) == 0
    assert infer.main([*base, "--out", str(tmp_path / "three"), "--steps", "3"]) == 0
    read = lambda name: json.loads((tmp_path / name / "run.json").read_text())["settings"]
    said, changed = read("out"), read("three")
    names = ("sampler", "steps", "guidance_scale", "guidance_interval")
    assert [said[name] for name in names] == ["euler", 2, 1.0, [0.0, 0.6]]
    assert [changed[name] for name in names] == ["euler", 3, 1.0, [0.0, 0.6]]


def test_a_bundle_of_before_is_run_as_before(tiny_bundle):
    manifest = replace(open_bundle(tiny_bundle).manifest, sampling={})
    assert Options().of_model(manifest) == Options(**FAST)


@pytest.mark.parametrize("text", ["{", "[]", '{"speed": 3}'])
def test_a_damaged_file_is_told(text, tmp_path):
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sampling\.json"):
        read_sampling(tmp_path / "sampling.json")
