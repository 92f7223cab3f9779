"""What the system refuses, and what nobody means: one line each, by every command."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from grounded_diffusion import __version__
from grounded_diffusion.cache import cache_folder
from grounded_diffusion.engine.cli import common, dataset, prompts
from grounded_diffusion.engine.cli.common import MOST, one_line, run_command
from grounded_diffusion.engine.dataset.formats.common import Classes
from grounded_diffusion.engine.prompts.file import PromptFile
from grounded_diffusion.engine.prompts.prompt import parse_prompt
from grounded_diffusion.engine.prompts.vocabulary import read_names
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import BundleError, CheckpointError, UsageError
from grounded_diffusion.files import MAX_LINE, check_place

COMMANDS = {"gd-infer": "engine.cli.infer", "gd-dataset": "engine.cli.dataset", "gd-prompts": "engine.cli.prompts",
            "gd-export": "export.cli", "gd-train": "training.cli", "gd-eval": "training.evaluation.cli",
            "gd-bench": "bench.cli"}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_version_and_debug(name, capsys):
    main = importlib.import_module(f"grounded_diffusion.{COMMANDS[name]}").main
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_line(name, capsys):
    main = importlib.import_module(f"grounded_diffusion.{COMMANDS[name]}").main
    for words in (["--out", ""], ["--bogus"], ["--out=", "x"], ["\udcff"], ["a\0b"], [" "]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{name}: "), words
        assert error.count("\n") == 1


@pytest.mark.parametrize("place", ["", " ", "~", "~/x", "~root/x", "s3:/b", "file:/x", "a\0b", "a\udcffb"])
def test_places_that_nobody_means(place):
    with pytest.raises(UsageError, match=r"\S") as caught:
        check_place(place, "out")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("place", [".", "./~", "a~b", "s3://b/c", "C:x", "a:b", "/x", "./s3:/b"])
def test_places_that_are_meant(place):
    check_place(place)


def broken(raised):
    def body():
        raise raised

    return body


def test_a_bug_is_one_line_with_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_command("gd-x", broken(ZeroDivisionError("a\nb" * 1000)), argv=["--seed", "3"]) == 1
    error = capsys.readouterr().err
    (file,) = (cache_folder() / "bugs").iterdir()
    assert error.count("\n") == 1
    assert len(error) < 500
    assert "this is a bug, ZeroDivisionError" in error
    assert str(file) in error
    assert "Traceback" in file.read_text()
    assert "['--seed', '3']" in file.read_text()


def test_debug_shows_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_command("gd-x", broken(ZeroDivisionError("x")), argv=["--debug"]) == 1
    assert "in body" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/x"), 2, "/x: Too many open files"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/" + "a" * 5000), 2, "aaa: File name too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("can't start new thread"), 1, "too many threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "there is not enough memory"),
        (BrokenPipeError(), 141, ""),
        (BundleError("no model"), 2, "no model"),
        (CheckpointError("no model"), 2, "no model"),
    ],
)
def test_what_the_system_refuses(capsys, raised, status, said):
    assert run_command("gd-x", broken(raised), argv=[]) == status
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)
    assert len(error) < 500


def test_a_line_is_one_line_whatever_it_was():
    assert one_line("a\nb\x1b[31m\udcff\0") == "a b\\x1b[31m\\udcff\\x00"
    assert len(one_line("x" * 10**6)) < MOST + 20
    assert one_line("a" * MOST) == "a" * MOST


def command(module, *words, stdout=subprocess.PIPE):
    code = f"import sys; from grounded_diffusion.{module} import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=stdout, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip


def test_closed_and_full_standard_output(data):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        run = command("engine.cli.dataset", "status", data, "--json", stdout=full)
        said = run.communicate(timeout=60)[1].decode()
    assert (run.returncode, said) == (2, "gd-dataset: cannot write to standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    run = command("engine.cli.dataset", "status", data, "--json", stdout=writer)
    os.close(writer)
    assert run.communicate(timeout=60)[1] == b""
    assert run.returncode == common.BROKEN_PIPE


def test_files_without_an_end(tmp_path, capsys):
    for file in ("/dev/full", "/dev/zero"):
        with pytest.raises(UsageError, match=f":1: the line has over {MAX_LINE:,} bytes"):
            PromptFile(file)
        assert prompts.main(["--names", file, "--out", str(tmp_path / "p.jsonl")]) == 2
        assert f"{file}:1: the line has over" in capsys.readouterr().err


def test_the_longest_line_is_read_and_a_longer_one_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    rest = "a [dog]"
    file.write_text("a [cat]\n" + "x" * (MAX_LINE - len(rest) - 1) + rest + "\n")
    assert PromptFile(file).prompts == 2
    file.write_text("a [cat]\n" + "x" * (MAX_LINE - len(rest)) + rest + "\n")
    with pytest.raises(UsageError, match=r"prompts\.txt:2: the line has over"):
        PromptFile(file)


def test_no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    monkeypatch.chdir(tmp_path)
    assert cache_folder().is_absolute()


def test_names_that_look_alike_are_one_name(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert parse_prompt(f"a [{apart}]").objects == (composed,)
    with pytest.raises(UsageError, match="named twice"):
        parse_prompt(f"a [{apart}] and a [{composed}]")
    (tmp_path / "names.txt").write_text(f"{apart}\n")
    assert read_names(tmp_path / "names.txt") == (composed,)
    assert Classes((composed,)).id(apart) == 1
    with pytest.raises(UsageError, match="differ only"):
        Classes((composed, apart))


def test_a_field_given_twice_in_a_prompt_is_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('a [dog]\n{"prompt": "a [cat]", "prompt": "a [dog]"}\n')
    with pytest.raises(UsageError, match=r"prompts\.txt:2: prompt is given twice"):
        list(PromptFile(file))


def test_a_shuffle_that_no_memory_holds_is_refused(tmp_path, capsys):
    words = ["--vocabulary", "coco", "--per-name", "1000000", "--shuffle-seed", "1", "--out", str(tmp_path / "p.jsonl")]
    assert prompts.main(words) == 2
    assert "mixes at most 2,000,000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ignored", "stopped"), [(False, True), (True, False)])
def test_sighup_stops_unless_it_is_ignored(ignored, stopped):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            deadline = time.monotonic() + (10 if stopped else 0.3)
            while not stop and time.monotonic() < deadline:
                time.sleep(0.01)
            assert bool(stop) == stopped
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_that_may_not_be_read(data, capsys):
    name = "x" * 300
    for words in (["stats", name], ["status", f"{data}/{name}"], ["verify", name], ["card", name]):
        assert dataset.main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 500
