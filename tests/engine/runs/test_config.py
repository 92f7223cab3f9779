"""RunConfig: what it refuses, what it makes of what is given, and what run.json says of it."""

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from grounded_diffusion.engine import Filters, FormatOptions, Options, Prompt, RunConfig
from grounded_diffusion.engine.cli.infer import build_parser, config_of
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.share import Share
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import BackendError, UsageError

BAD = {
    "no prompts": (dict(prompts=()), "no prompts; give `prompt_file` or `prompts`"),
    "a prompt that is none": (dict(prompts=["a [dog]", 7]), "prompt 2 must be a string or a Prompt, not int"),
    "brackets": (dict(prompts=[Prompt("a [dog]", ("dog",))]), "has brackets, which would mark objects"),
    "attempts": (dict(attempts=0), "attempts must be a whole number from 1 to 1000, not 0"),
    "threads": (dict(threads=0), "threads must be"),
    "lanes": (dict(lanes=65), "lanes must be"),
    "shard size": (dict(shard_size=1.5), "shard_size must be"),
    "backend": (dict(backend="tpu"), "there is no backend 'tpu'; choose one of onnxruntime, "),
    "format": (dict(format="pascal"), "there is no format 'pascal'; known are folder, "),
    "shard": (dict(shard="4/4"), r"worker 4 of 4 \(shard\) does not exist"),
    "scheduler": (dict(shard="auto"), "shard auto finds no scheduler"),
    "device": (dict(device=0), "device is for a backend on a GPU"),
    "device of ray": (dict(device=0, backend="cuda", ray=""), "device is for a backend on a GPU, in this process"),
    "no device": (dict(device=-1, backend="cuda"), "device must be a whole number from 0 to 255"),
    "overwrite": (dict(shard="0/4", overwrite=True), "overwrite with shard would remove what other workers make"),
    "workers": (dict(workers=2), "workers is for ray; give threads"),
    "metrics": (dict(metrics_port="70000"), "metrics_port must be a port"),
    "no void": (dict(format="coco", format_options=FormatOptions(void_border=1)), "leave void_border out"),
    "polygons": (dict(format="voc", format_options=FormatOptions(polygons=True)), "polygons is for coco, not voc"),
    "png": (dict(format="voc", format_options=FormatOptions(png=True)), "leave png out"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_at_construction(case):
    fields, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        RunConfig(**{"out": "out", "prompts": ["a [dog]"]} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(jpeg_quality=0), "jpeg_quality must be from 1 to 100, not 0"),
        (dict(jpeg_quality=90, png=True), "leave one of the two out"),
        (dict(void_border=65), "void_border must be from 0 to 64"),
        (dict(void_band=(0.7, 0.3)), "void_band takes two probabilities, the lower first"),
    ],
)
def test_format_options_are_checked(fields, message):
    with pytest.raises(UsageError, match=message):
        FormatOptions(**fields)


def test_what_is_given_in_any_form():
    prompts = ["a [dog]", Prompt("the sea", ("sea",), seed=3, count=2)]
    config = RunConfig(
        out="out", prompts=prompts, prompt_file="p.txt", model="bundle", log="log", shard="2/8", metrics_port=9100
    )
    assert config.prompts == ("a [dog]", '{"prompt": "the sea", "objects": ["sea"], "seed": 3, "count": 2}')
    assert (config.prompt_file, config.model, config.log) == (Path("p.txt"), Path("bundle"), Path("log"))
    assert config.shard == Share(2, 8, "shard")
    assert RunConfig(out="out", prompts="a [dog]").prompts == ("a [dog]",)
    with pytest.raises(FrozenInstanceError):
        config.out = "other"
    with pytest.raises(TypeError):
        RunConfig(out="out", prompts="a [dog]", stepz=3)


def test_it_travels_to_other_processes():
    config = RunConfig(
        out="s3://bucket/out", prompts="a [dog]", format="coco", options=Options(steps=3, size=64), shard="1/2",
        filters=Filters(min_area=0.1), format_options=FormatOptions(names=["dog", "cat"]),
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, overwrite=False) == config


def test_the_command_line_and_python_say_the_same():
    given = "--prompts p.txt --prompt a_[dog] --out o --model b --format voc --names coco --void-band 0.3 0.7 --steps 5"
    given += " --size 64x96 --seed 9 --require-masks --min-area 0.1 --attempts 2 --threads 1 --shard 1/2 --log l"
    given += " --metrics-port 9100 --jpeg-quality 80"
    assert config_of(build_parser().parse_args(given.split())) == RunConfig(
        prompt_file="p.txt", prompts="a_[dog]", out="o", model="b", format="voc",
        format_options=FormatOptions(names="coco", void_band=(0.3, 0.7), jpeg_quality=80),
        options=Options(steps=5, size=(64, 96), seed=9), filters=Filters(require_masks=True, min_area=0.1),
        attempts=2, threads=1, shard="1/2", log="l", metrics_port="9100",
    )  # fmt: skip


def test_defaults_of_the_command_line_are_those_of_python():
    parsed = build_parser().parse_args(["--prompt", "a [dog]", "--out", "out"])
    assert config_of(parsed) == RunConfig(prompts="a [dog]", out="out")


def test_run_json_says_what_it_always_said(tiny_bundle, tmp_path):
    """Names, order and values: a data set that was begun by an older version goes on."""
    run = open_run(RunConfig(prompts="a [dog]", out=tmp_path / "out", model=tiny_bundle, format="voc"), print, Stop())
    settings = dict(run.settings)
    assert len(settings.pop("model")) == 64
    assert json.dumps(settings) == json.dumps({
        "backend": "onnxruntime", "prompts": "116fe2c89a9368bb6ddb6465483a4d346407c27453f1383e840401573440025d",
        "samples": 1, "steps": 20, "guidance_scale": 7.5, "guidance_interval": [0.0, 0.6], "sampler": "dpmpp-2m",
        "seed": 7, "images_per_prompt": 1, "batch": 16, "threshold": 0.5, "size": [64, 64], "shard_size": 256,
        "attempts": 4, "require_masks": False, "min_area": None, "max_area": None, "min_score": None,
        "max_overlap": None, "min_distance": None, "format": "voc", "classes": {"dog": 1}, "jpeg_quality": 95,
        "void_border": 0, "void_band": None, "polygons": False,
    })  # fmt: skip


def test_a_driver_of_ray_opens_no_gpu(tiny_bundle, tmp_path):
    """On a head node without one the run is planned, and what has to run is refused in one line."""
    config = RunConfig(
        prompts="a [dog]", out=tmp_path / "out", model=tiny_bundle, backend="cuda", ray="", options=Options(steps=2)
    )
    run = open_run(config, print, Stop())
    assert run.config.options.batch == 16
    with pytest.raises(BackendError, match="cuda runs in Ray's workers"):
        list(run.pipe.generate(["a [dog]"]))
