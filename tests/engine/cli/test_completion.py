"""--print-completion: a script that bash takes, and that completes what the parsers have."""

import builtins
import subprocess

import pytest

from grounded_diffusion.engine.cli import dataset, infer, prompts

COMMANDS = {"gd-infer": infer.main, "gd-dataset": dataset.main, "gd-prompts": prompts.main}


@pytest.fixture
def complete(tmp_path, monkeypatch, capsys):
    """What bash offers after some words."""
    pytest.importorskip("shtab")
    monkeypatch.chdir(tmp_path)

    def complete(command, *words):
        with pytest.raises(SystemExit) as stopped:
            COMMANDS[command](["--print-completion", "bash"])
        assert stopped.value.code in (0, None)
        call = f"_shtab_{command.replace('-', '_')}"
        asked = f'COMP_WORDS=({command} {" ".join(words)}); COMP_CWORD={len(words)}; {call}; echo "${{COMPREPLY[@]}}"'
        script = f"{capsys.readouterr().out}\n{asked}"
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=30)
        return run.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("gd-infer", "--samp"), ["--sampler"]),
        (("gd-infer", "--sampler", "dpm"), ["dpmpp-2m"]),
        (("gd-infer", "--format", "coco"), ["coco", "coco-panoptic"]),
        (("gd-dataset", "ver"), ["verify"]),
        (("gd-dataset", "convert", "--poly"), ["--polygons"]),
        (("gd-prompts", "--per-p"), ["--per-pair"]),
    ],
)
def test_bash_completes(complete, words, offered):
    assert complete(*words) == offered


@pytest.mark.parametrize("option", ["--prompts", "--model"])
def test_files_are_completed(complete, tmp_path, option):
    (tmp_path / "prompts").mkdir()
    assert complete("gd-infer", option, "pro") == ["prompts"]


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    really = builtins.__import__

    def without(name, *rest):
        if name == "shtab":
            raise ImportError(name)
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert infer.main(["--print-completion", "bash"]) == 2
    assert "pip install 'grounded-diffusion[completion]'" in capsys.readouterr().err
