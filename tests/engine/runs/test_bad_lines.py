"""Prompt files with bad lines: refused, or with --skip-bad-lines run without them, each of which is listed."""

import json

import pytest

from grounded_diffusion.engine.cli import infer
from grounded_diffusion.engine.prompts.file import PromptFile
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import UsageError

LINES = [
    "# a comment",
    "a photograph of a [dog]",
    "a photograph of nothing",
    '{"prompt": "a [cat]", "count": 2}',
    '{"prompt": "a [cat]", "count": 0}',
    "a [dog and a cat",
    "",
    "a photograph of a [\u200b]",
    "a [unicorn]",
]
REASONS = {3: "names no objects", 5: "count must be", 6: "is not closed", 8: "invisible character"}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(LINES), encoding="utf-8")
    return tmp_path / "prompts.txt"


def test_a_bad_line_is_an_error(file):
    with pytest.raises(UsageError, match=r"prompts\.txt:3: the prompt names no objects"):
        PromptFile(file)


def test_bad_lines_are_left_out_and_listed(file):
    prompts = PromptFile(file, ["a [bird]"], 3, skip_bad=True)
    assert [(count, prompt.objects[0]) for count, prompt in prompts] == [
        (3, "dog"), (2, "cat"), (3, "unicorn"), (3, "bird")
    ]  # fmt: skip
    assert (prompts.prompts, prompts.samples) == (4, 11)
    assert len(prompts.skipped) == len(REASONS)
    for said, (line, reason) in zip(prompts.skipped, REASONS.items(), strict=True):
        assert said.startswith(f"{file}:{line}: ")
        assert reason in said
    wanted = [(index, prompt.objects[0]) for index, prompt, _ in prompts.between(2, 7)]
    assert wanted == [(2, "dog"), (3, "cat"), (4, "cat"), (5, "unicorn"), (6, "unicorn")]


def test_a_file_without_bad_lines_is_the_same_file(tmp_path):
    (tmp_path / "good.txt").write_text("a [dog]\na [cat]\n")
    (tmp_path / "bad.txt").write_text("a [dog]\nnothing\na [cat]\n")
    good, bad = PromptFile(tmp_path / "good.txt"), PromptFile(tmp_path / "bad.txt", skip_bad=True)
    assert bad.digest == good.digest


def test_a_file_of_bad_lines_only_says_so(tmp_path):
    (tmp_path / "bad.txt").write_text("nothing\nnothing\n")
    with pytest.raises(UsageError, match=r"has no prompts that can be used; .*bad\.txt:1: the prompt names no objects"):
        PromptFile(tmp_path / "bad.txt", skip_bad=True)


def test_a_prompt_of_the_command_line_is_never_left_out(file):
    with pytest.raises(UsageError, match="prompt 1: the prompt names no objects"):
        list(PromptFile(file, ["nothing"], skip_bad=True))


def test_what_the_classes_lack_is_left_out_too(file, tiny_bundle, tmp_path):
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    given = ["--prompts", file, "--skip-bad-lines", "--out", tmp_path / "out", "--model", tiny_bundle]
    given += ["--format", "voc", "--names", tmp_path / "names.txt"]
    config = infer.config_of(infer.build_parser().parse_args([str(option) for option in given]))
    said = []
    run = open_run(config, said.append, Stop())
    run.pipe.close()
    assert run.plan.prompts.samples == 3
    skipped = [line for line in said if line.startswith("skipped ")]
    assert len(skipped) == len(REASONS) + 1
    assert skipped[-1].startswith(f"skipped {file}:9: ")
    assert "unicorn" in skipped[-1]


def test_the_command_lists_them_and_goes_on(file, tiny_bundle, tmp_path, capsys):
    given = ["--prompts", file, "--out", tmp_path / "out", "--model", tiny_bundle, "--steps", "1", "--batch", "2"]
    given = [str(option) for option in given]
    assert infer.main(given) == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert infer.main([*given, "--skip-bad-lines"]) == 0
    said = capsys.readouterr().err
    assert [f"skipped {file}:{line}: " in said for line in REASONS] == [True] * len(REASONS)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["samples"] == 4


def test_python_says_it_too(file, tmp_path):
    assert RunConfig(prompt_file=file, out=tmp_path, skip_bad_lines=True).skip_bad_lines
