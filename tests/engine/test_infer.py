"""gd-infer as a person runs it: whole runs, refusals in one line, interruption, and no torch anywhere."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from grounded_diffusion.engine import shipped
from grounded_diffusion.engine.cli import main, parse_size
from grounded_diffusion.errors import BundleError, UsageError

NAMES = ["dog", "cat", "unicorn", "dragon", "rocket", "sea", "potted plant", "tv monitor"]
BLOCKED = ("torch", "diffusers", "transformers", "onnxscript", "onnx", "accelerate", "safetensors")
WITHOUT_TORCH = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " must not be imported by the engine")

sys.meta_path.insert(0, Blocker())
from grounded_diffusion.engine.cli import main
status = main(sys.argv[1:])
found = sorted(name for name in {BLOCKED!r} if name in sys.modules)
assert not found, found
sys.exit(status)
"""


def mixed_prompts(count):
    lines = ["# mixed prompts", ""]
    for i in range(count):
        names = [NAMES[(i + k) % 8] for k in range(1 + i % 4)]
        if i % 5 == 4:
            lines.append(json.dumps({"prompt": "a photograph of the sea", "objects": names, "seed": i}))
        else:
            lines.append("a photograph of " + " and ".join(f"a [{name}]" for name in names))
    return "\n".join(lines)


def read_records(out):
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def check_masks(out):
    records = read_records(out)
    for record in records:
        shape = (record["height"], record["width"])
        assert np.asarray(Image.open(out / record["image"])).shape == (*shape, 3)
        labels = np.asarray(Image.open(out / record["mask"]))
        assert labels.shape == shape and labels.max() <= len(record["objects"])
        for thing in record["objects"]:
            mask = np.asarray(Image.open(out / thing["mask"]))
            assert mask.shape == shape and mask.sum() == thing["area"]
            x, y, width, height = thing["box"]
            assert mask[y : y + height, x : x + width].sum() == thing["area"]
            assert not (labels == thing["label"])[~mask].any()
    return records


def test_200_mixed_prompts_without_torch(tiny_bundle, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(mixed_prompts(200))
    options = ["--model", str(tiny_bundle), "--prompts", str(prompts), "--out", str(out), "--steps", "1"]
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    records = check_masks(out)
    assert len(records) == 200 and {len(record["objects"]) for record in records} == {1, 2, 3, 4}
    assert records[4]["prompt"] == "a photograph of the sea" and records[4]["seed"] == 4
    assert "masks are read at step 1 of 1, timestep 1" in run.stderr and "images/s" in run.stderr
    assert "200 images with" in run.stdout and "\x1b" not in run.stderr  # plain lines, not on a terminal


def test_importing_the_engine_is_quick():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import grounded_diffusion.engine"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in run.stderr.splitlines() if line.endswith("| grounded_diffusion.engine")]
    assert int(line.split("|")[1]) < 1_000_000  # microseconds
    assert not any(f" {name}\n" in run.stderr for name in ("onnxruntime", "tokenizers", "PIL", "rich", "torch"))


def test_an_interrupted_run_can_be_resumed(tiny_bundle, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(mixed_prompts(24))
    options = ["--model", str(tiny_bundle), "--prompts", str(prompts), "--steps", "8", "--batch", "2"]
    command = [sys.executable, "-m", "grounded_diffusion.engine.cli", *options]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    run = subprocess.Popen([*command, "--out", str(broken)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((broken / "images").glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert "--resume goes on" in run.stderr.read()
    some = check_masks(broken)
    assert 1 <= len(some) < 24 and not list(broken.rglob("*.tmp")) and not list(broken.rglob("*.part"))
    assert main([*options, "--out", str(broken), "--resume"]) == 0
    assert main([*options, "--out", str(whole)]) == 0
    resumed, expected = check_masks(broken), check_masks(whole)
    assert [record["id"] for record in resumed] == [record["id"] for record in expected]
    assert sorted(path.relative_to(broken) for path in broken.rglob("*")) == sorted(
        path.relative_to(whole) for path in whole.rglob("*")
    )
    for got, wanted in zip(resumed, expected, strict=True):
        assert (got["prompt"], got["seed"], got["draw"]) == (wanted["prompt"], wanted["seed"], wanted["draw"])
        images = [np.asarray(Image.open(out / got["image"])).astype(int) for out in (broken, whole)]
        assert np.abs(images[0] - images[1]).max() <= 1
        labels = [np.asarray(Image.open(out / got["mask"])) for out in (broken, whole)]
        assert (labels[0] == labels[1]).mean() > 0.999


def fails(capsys, *options):
    """(exit status, the one line on standard error)."""
    status = main([str(option) for option in options])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("gd-infer: ")
    return status, captured.err


PROMPT = ("--prompt", "a [dog]")
BAD = {
    "no prompts": ((), "give --prompts FILE or --prompt TEXT"),
    "missing prompt file": (("--prompts", "absent.txt"), "there is no prompt file absent.txt"),
    "no brackets": (("--prompt", "a dog"), "prompt 1: the prompt names no objects; mark objects with brackets"),
    "steps": ((*PROMPT, "--steps", "0"), "steps must be"),
    "steps are no number": ((*PROMPT, "--steps", "many"), "invalid int value: 'many'"),
    "sampler": ((*PROMPT, "--sampler", "heun"), "invalid choice: 'heun'"),
    "size": ((*PROMPT, "--size", "64*64"), "is not a size"),
    "size not divisible": ((*PROMPT, "--size", "70"), "height 70 is not divisible by"),
    "threshold": ((*PROMPT, "--threshold", "2"), "threshold must be"),
    "threads": ((*PROMPT, "--threads", "0"), "--threads must be"),
    "unknown option": ((*PROMPT, "--stepz", "3"), "unrecognized arguments: --stepz"),
    "both": ((*PROMPT, "--resume", "--overwrite"), "not allowed with"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_bundle, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    status, line = fails(capsys, "--model", tiny_bundle, "--out", "out", *options)
    assert status == 2 and message in line
    assert not list(tmp_path.iterdir())


def test_bad_bundle(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for model, message in (("absent", "there is no bundle"), ("empty", "has no manifest.json")):
        status, line = fails(capsys, *PROMPT, "--model", tmp_path / model, "--out", tmp_path / "out")
        assert status == 1 and message in line and not (tmp_path / "out").exists()


def test_output_folders(tiny_bundle, tmp_path, capsys):
    run = (*PROMPT, "--model", tiny_bundle, "--steps", "1", "--out")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert main([str(o) for o in (*run, tmp_path / "out")]) == 0
    capsys.readouterr()
    for options, message in (
        ((*run, tmp_path / "file"), "is a file"),
        ((*run, tmp_path / "mine", "--overwrite"), "was not written by gd-infer"),
        ((*run, tmp_path / "out"), "--resume finishes what is missing, --overwrite starts again"),
        ((*run, "/proc/out"), "cannot write"),
        ((*run, tmp_path / "out", "--resume", "--prompt", "a [cat]"), "prompts was"),
        ((*run, tmp_path / "out", "--resume", "--seed", "8"), "seed was 7, now 8"),
    ):
        status, line = fails(capsys, *options)
        assert status == 2 and message in line
    assert len(check_masks(tmp_path / "out")) == 1
    assert main([str(o) for o in (*run, tmp_path / "out", "--overwrite", "--prompt", "a [cat]")]) == 0
    assert [record["prompt"] for record in check_masks(tmp_path / "out")] == ["a dog", "a cat"]


def test_long_prompts_warn_once(tiny_bundle, tmp_path, capsys):
    long = "a [dog] " + "and a cat next to a dragon " * 11 + "zzz"
    options = ("--model", tiny_bundle, "--prompt", long, "--prompt", long, "--steps", "1", "--out", tmp_path / "out")
    assert main([str(option) for option in options]) == 0
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "over 77 tokens" in said and "zzz" in said


def test_sizes():
    assert parse_size("512") == (512, 512) and parse_size("512x768") == (512, 768)


def test_help_and_version(capsys):
    for option, text in (("--help", "exit status: 0 done"), ("--version", "gd-infer 0.")):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0 and text in capsys.readouterr().out


def test_shipped_model_comes_from_the_cache(tiny_checkpoint, tiny_bundle, tmp_path):
    key = shipped.checkpoint_key(tiny_checkpoint)
    cached = tmp_path / f"{tiny_checkpoint.name}-{key[:16]}"
    shutil.copytree(tiny_bundle, cached)
    said = []
    assert shipped.cached_export(tiny_checkpoint, tmp_path, said.append) == cached and not said


def test_the_cache_key_is_the_checkpoint(tiny_checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert shipped.checkpoint_key(copy) == shipped.checkpoint_key(tiny_checkpoint)
    (copy / "model_index.json").write_text("{}")
    assert shipped.checkpoint_key(copy) != shipped.checkpoint_key(tiny_checkpoint)


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shipped.cache_folder() == tmp_path / "grounded-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert shipped.cache_folder() == tmp_path / "home" / ".cache" / "grounded-diffusion"


def test_export_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "NEEDED", ("a_module_nobody_has",))
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UsageError, match=r"pip install 'grounded-diffusion\[export\]', or pass --model"):
        shipped.cached_export(tmp_path / "checkpoint", tmp_path / "cache", print)
    assert not (tmp_path / "cache").exists()


def test_a_failed_export_leaves_nothing(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(BundleError, match=r"exporting .* failed: "):
        shipped.cached_export(tmp_path / "checkpoint", tmp_path / "cache", lambda line: None)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_without_a_model_the_shipped_one_is_exported_once(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """The real export, in its own process, of a tiny stand-in for the shipped checkpoint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "shipped_checkpoint", lambda: tiny_checkpoint)
    for name in ("one", "two"):
        assert main([*PROMPT, "--steps", "1", "--out", str(tmp_path / name)]) == 0
        assert ("exporting the shipped model" in capsys.readouterr().err) == (name == "one")
        assert len(check_masks(tmp_path / name)) == 1
    (cached,) = (tmp_path / "cache" / "grounded-diffusion").iterdir()
    next(cached.glob("unet.onnx")).write_bytes(b"damaged")
    assert main([*PROMPT, "--steps", "1", "--out", str(tmp_path / "three")]) == 0
    assert "exporting the shipped model" in capsys.readouterr().err
