"""gd-infer --config: a TOML file of options, or the run.json of another run; --quiet, --json, --seed random."""

import io
import json
import sys

import pytest
from helpers import null_backend as null

from grounded_diffusion.engine.cli.config_file import parse_with_config
from grounded_diffusion.engine.cli.infer import build_parser, config_of
from grounded_diffusion.engine.dataset.runfile import run_json
from grounded_diffusion.errors import UsageError

SHORT = ["--steps", "2", "--sampler", "ddim", "--batch", "2"]


@pytest.fixture
def parse(tmp_path):
    """The options of a configuration file and a command line."""

    def parse(text, *words, name="run.toml"):
        file = tmp_path / name
        file.write_text(text)
        return parse_with_config(build_parser(), ["--config", str(file), *words])

    return parse


@pytest.fixture
def run(tiny_bundle, tmp_path, monkeypatch):
    """gd-infer on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: null.main(["--model", tiny_bundle, *SHORT, *words])


TOML = """
prompt = ["a [dog]", "-a [cat]"]
out = "out"
steps = 5
guidance-interval = [0.1, 0.5]
size = "64x96"
require-masks = true
png = false
min_area = 0.01
names = ["cat", "dog"]
format = "coco"
"""


def test_a_file_says_what_the_command_line_would(parse):
    words = ["--prompt=a [dog]", "--prompt=-a [cat]", "--out=out", "--steps=5", "--guidance-interval", "0.1", "0.5",
             "--size=64x96", "--require-masks", "--min-area=0.01", "--format=coco"]  # fmt: skip
    expected = build_parser().parse_args(words)
    expected.names = ("cat", "dog")
    assert config_of(parse(TOML)) == config_of(expected)


@pytest.mark.parametrize(
    ("text", "ray"), [("ray = true", ""), ("ray = false", None), ('ray = "head:10001"', "head:10001")]
)
def test_what_stands_alone_stands_alone_in_a_file_too(parse, text, ray):
    assert parse(text).ray == ray


def test_the_command_line_wins(parse):
    args = parse(TOML, "--steps", "7", "--format=voc", "--prompt", "a [whale]", "--names", "voc")
    assert (args.steps, args.format, args.prompt, args.names) == (7, "voc", ["a [whale]"], "voc")
    assert args.min_area == 0.01


@pytest.mark.parametrize(
    ("text", "words", "name", "value"),
    [
        ("jpeg-quality = 80", ["--png"], "jpeg_quality", None),
        ("png = true", ["--jpeg-quality", "80"], "png", False),
        ('backend = "openvino"', ["--precision", "fp32"], "backend", "onnxruntime"),
        ('prompts = "file.txt"', ["--prompt", "a [dog]"], "prompts", None),
        ('prompt = "a [dog]"', ["--prompts", "file.txt"], "prompt", []),
    ],
)
def test_what_excludes_a_files_option_takes_its_place(parse, text, words, name, value):
    assert getattr(parse(text, *words), name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 5", "run.toml: there is no option stepz; did you mean steps?"),
        ("config = 'x'", "there is no option config"),
        ("steps = 'many'", "run.toml: argument --steps: invalid int value: 'many'"),
        ("steps = true", "run.toml: steps takes a value, not true"),
        ('ray = ""', "run.toml: --ray is empty"),
        ("png = 3", "run.toml: png cannot be 3"),
        ("steps = {a = 1}", "steps cannot be"),
        ("size = [64, 64, 64]", "unrecognized arguments"),
        ("steps = ", "run.toml cannot be read"),
        ("format = 'pascal'", "invalid choice: 'pascal'"),
    ],
)
def test_what_a_file_cannot_say(parse, text, said):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": 3}', '{"settings": {"merged": []}}', "{"])
def test_what_is_no_run(parse, content):
    with pytest.raises(UsageError, match=r"run\.json"):
        parse(content, name="run.json")


def test_a_runs_setting_without_an_option(parse):
    content = run_json("folder", {"steps": 4, "stepps": 5}).decode()
    with pytest.raises(UsageError, match="has the setting stepps, for which gd-infer has no option"):
        parse(content, name="run.json")


def test_no_such_file(capsys):
    assert null.main(["--config", "absent.toml"]) == 2
    assert "cannot read absent.toml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--format", "coco", "--png", "--min-score", "0.1", "--attempts", "2", "--polygons"],
        ["--format", "voc", "--names", "coco", "--void-band", "0.2", "0.7", "--val", "0.5", "--size", "32x64"],
        ["--negative-prompt", "snow", "--guidance-scale", "3", "--shard-size", "2", "--seed", "9"],
    ],
    ids=["defaults", "coco", "voc", "negative prompt"],
)
def test_the_run_json_of_a_run_makes_the_same_again(run, tiny_bundle, tmp_path, options):
    prompts = ["--prompt", "a [dog] and a [cat]", "--images-per-prompt", "4"]
    assert run(*prompts, *options, "--out", "first") in (0, 3)
    again = ["--model", tiny_bundle, "--config", "first/run.json", "--prompt", prompts[1], "--out", "again"]
    assert null.main(again) in (0, 3)
    assert (tmp_path / "again/run.json").read_bytes() == (tmp_path / "first/run.json").read_bytes()
    assert (tmp_path / "again/summary.json").read_bytes() == (tmp_path / "first/summary.json").read_bytes()


def test_a_seed_is_drawn_once(run, tmp_path, capsys):
    seeds = []
    for out in ("a", "b"):
        assert run("--prompt", "a [dog]", "--seed", "random", "--out", out) == 0
        seeds.append(json.loads((tmp_path / out / "run.json").read_text())["settings"]["seed"])
        assert f"drew the seed {seeds[-1]}\n" in capsys.readouterr().err
    assert seeds[0] != seeds[1]
    assert run("--prompt", "a [dog]", "--seed", "random", "--out", "a") == 0
    assert "drew" not in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "run.json").read_text())["settings"]["seed"] == seeds[0]


def test_what_is_no_seed(run, capsys):
    assert run("--prompt", "a [dog]", "--out", "out", "--seed", "any") == 2
    assert "'any' is not a seed; give a whole number, or random" in capsys.readouterr().err


def test_quiet(run, capsys):
    assert run("--prompt", "a [dog]", "--out", "out", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run("--prompt", "a dog", "--out", "out", "--quiet") == 2
    assert "names no objects" in capsys.readouterr().err


def test_json(run, capsys):
    assert run("--prompt", "a [dog]", "--out", "out", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"path": "out", "finished": True, "samples": 1, "accepted": 1, "rejected": 0, "quarantined": 0,
                      "masks": 1, "reasons": {}}  # fmt: skip


def test_prompts_from_standard_input(run, tmp_path, monkeypatch, capsys):
    stdin = lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    for _ in range(2):  # the second time everything is there
        stdin(b"# comment\na [dog]\na [cat]\n")
        assert run("--prompts", "-", "--out", "out") == 0
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a dog", "a cat"]
    stdin(b"a [dog]\na dog\n")
    capsys.readouterr()
    assert run("--prompts", "-", "--out", "other") == 2
    assert "standard input:2: the prompt names no objects" in capsys.readouterr().err


def test_standard_input_is_not_for_ray(run, capsys):
    assert run("--prompts", "-", "--out", "out", "--ray") == 2
    assert "Ray's workers have no standard input; give --prompts FILE a file" in capsys.readouterr().err


def test_all_bad_lines_are_told(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text('a [dog]\na dog\n{"prompt": "a [dog]", "count": 0}\na [dog\n')
    assert run("--prompts", "prompts.txt", "--out", "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in said] == [*(f"prompts.txt:{k}" for k in (2, 3, 4)), said[-1][10:]]
    assert said[-1] == "gd-infer: 3 prompts cannot be used; repair them all, then give the same command"
    assert not (tmp_path / "out").exists()


def test_of_many_bad_lines_twenty_are_shown(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n" * 50)
    assert run("--prompts", "prompts.txt", "--out", "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 21
    assert "50 prompts cannot be used, of which 20 are shown" in said[-1]


def test_all_names_without_a_class_are_told(run, capsys):
    words = ["--format", "voc", "--names", "voc", "--out", "out"]
    assert run("--prompt", "a [unicorn]", "--prompt", "a [dog]", "--prompt", "a [dragon]", *words) == 2
    said = capsys.readouterr().err.splitlines()
    assert ["'unicorn'" in said[0], "'dragon'" in said[1], len(said)] == [True, True, 3]
    assert said[0].endswith("add it to --names")


@pytest.mark.parametrize("names", ["absent.txt", "voc"])
def test_names_are_never_ignored(run, tmp_path, capsys, names):
    """Neither a file that is not there, nor by a format that has no use for them."""
    assert run("--prompt", "a [dog]", "--names", names, "--out", "out") == 2
    assert "folder has no class ids, so it takes no --names; leave it out" in capsys.readouterr().err
    assert run("--prompt", "a [unicorn]", "--format", "coco", "--names", names, "--out", "out") == 2
    assert ("cannot read absent.txt" if names != "voc" else "'unicorn' is not among") in capsys.readouterr().err
