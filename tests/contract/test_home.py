"""Nothing is sent home, and none is needed: ONNX Runtime's telemetry, and users without a home or rights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import grounded_diffusion
from grounded_diffusion.cache import cache_folder
from grounded_diffusion.errors import UsageError

# As a user id without an entry, as containers are given, and without root's rights over what others have closed.
NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
COMMANDS = {
    "gd-infer": "grounded_diffusion.engine.cli.infer",
    "gd-dataset": "grounded_diffusion.engine.cli.dataset",
    "gd-prompts": "grounded_diffusion.engine.cli.prompts",
    "gd-export": "grounded_diffusion.export.cli",
    "gd-bench": "grounded_diffusion.bench.cli",
    "gd-train": "grounded_diffusion.training.cli",
    "gd-eval": "grounded_diffusion.training.evaluation.cli",
}
as_nobody = pytest.mark.skipif(subprocess.run([*NOBODY, "true"], check=False).returncode != 0,
                               reason="this system gives no user namespaces")  # fmt: skip


def run(module, *arguments, user=(), folder="/", **environment):
    """A command in a process of its own, which inherits nothing but the way to the package."""
    paths = [str(Path(grounded_diffusion.__file__).parents[1]), *(path for path in sys.path if "site-packages" in path)]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1", **environment}  # fmt: skip
    command = [*user, sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_no_telemetry_after_a_run(tiny_bundle, tmp_path):
    """With a fresh cache folder and a fresh home: nothing is in them that is not ours."""
    out, cache, home = tmp_path / "out", tmp_path / "cache", tmp_path / "home"
    home.mkdir()
    options = ["--model", tiny_bundle, "--prompt", "a [dog]", "--steps", "1", "--out", out, "--threads", "1"]
    done = run(COMMANDS["gd-infer"], *options, HOME=str(home), XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0, done.stderr
    assert list(out.glob("images/000/*.png"))
    assert [str(path) for path in (*cache.rglob("*"), *home.rglob("*")) if path.is_file()] == []


@pytest.mark.parametrize("module", sorted(COMMANDS.values()))
def test_every_command_turns_it_off_before_onnxruntime_is_imported(tmp_path, module):
    """And every process that it starts inherits that, a worker of Ray as well as an export."""
    names = ("ORT_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")
    code = f"import {module}, os, onnxruntime; print(*(os.environ[name] for name in {names!r}))"
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.split() == ["1", "0"]
    assert not (tmp_path / "cache" / "Microsoft").exists()


def test_who_wants_telemetry_may_have_it():
    code = "import grounded_diffusion, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, kept in (("0", "0"), ("", "1")):
        env = os.environ | {"ORT_DISABLE_TELEMETRY": given}
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == kept


@as_nobody
@pytest.mark.parametrize("home", [None, "closed", "nowhere"])
def test_without_a_home_commands_work(tiny_bundle, tmp_path, home):
    """As a user id without an entry: with no HOME, or one that may not be written, or that is not there."""
    (tmp_path / "closed").mkdir(mode=0o500)
    environment = {"TMPDIR": str(tmp_path)} | ({"HOME": str(tmp_path / home)} if home else {})
    out, prompts, coco = (tmp_path / name for name in ("out", "prompts.jsonl", "coco"))
    options = ["--model", tiny_bundle, "--steps", "1", "--threads", "1", "--out", out]
    for command, arguments in (
        ("gd-prompts", ["--vocabulary", "things-64", "--per-name", "1", "--per-pair", "0", "--out", prompts]),
        ("gd-infer", [*options, "--prompts", prompts, "--format", "folder"]),
        ("gd-dataset", ["verify", out]),
        ("gd-dataset", ["convert", out, "--format", "coco", "--out", coco]),
        ("gd-dataset", ["card", out]),
        ("gd-export", ["--help"]),
        ("gd-bench", ["--help"]),
        ("gd-train", ["--help"]),
        ("gd-eval", ["--help"]),
    ):
        done = run(COMMANDS[command], *arguments, user=NOBODY, folder=tmp_path, **environment)
        assert done.returncode == 0, (command, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "~").exists()


@as_nobody
@pytest.mark.parametrize("command", ["gd-infer", "gd-dataset", "gd-prompts", "gd-export"])
def test_what_may_not_be_read_is_one_line(tiny_bundle, tmp_path, command):
    """A parent folder that is closed, wherever a path may be given."""
    closed, out = tmp_path / "closed", tmp_path / "o"
    closed.mkdir(mode=0o000)
    inner, base = closed / "inner", ["--model", tiny_bundle, "--steps", "1"]
    tries = {
        "gd-infer": [
            [*base, "--prompt", "a [dog]", "--out", inner], [*base, "--prompts", inner, "--out", out],
            ["--prompt", "a [dog]", "--model", inner, "--out", out],
            [*base, "--prompt", "a [dog]", "--out", out, "--metrics-file", inner.with_suffix(".prom")],
            [*base, "--prompt", "a [dog]", "--out", out, "--log", inner],
            [*base, "--prompt", "a [dog]", "--out", out, "--format", "voc", "--names", inner],
        ],
        "gd-dataset": [
            ["verify", inner], ["status", inner], ["stats", inner], ["preview", inner], ["card", inner],
            ["split", inner, "--val", "0.1"], ["convert", inner, "--format", "voc", "--out", out],
            ["merge", inner, inner, "--out", out],
        ],
        "gd-prompts": [
            ["--vocabulary", "voc", "--out", inner], ["--names", inner, "--out", tmp_path / "p.jsonl"],
            ["--vocabulary", "voc", "--templates", inner, "--out", tmp_path / "p.jsonl"],
        ],
        "gd-export": [["--ckpt", tmp_path, "--out", inner], ["--ckpt", inner, "--out", out]],
    }  # fmt: skip
    for arguments in tries[command]:
        done = run(COMMANDS[command], *arguments, user=NOBODY, folder=tmp_path, TMPDIR=str(tmp_path))
        assert done.returncode in (1, 2), (arguments, done.stderr)
        assert done.stderr.startswith(f"{command}: "), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "grounded-diffusion"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored, says the standard
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "grounded-diffusion"


def test_a_cache_among_the_temporary_files_is_nobody_elses(monkeypatch, tmp_path):
    """Where there is no home: what others could put there is not used."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"grounded-diffusion-{os.getuid()}"
    assert cache_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        cache_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="set XDG_CACHE_HOME"):
        cache_folder()
