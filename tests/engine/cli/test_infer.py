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

from grounded_diffusion.engine.cli.common import parse_size
from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.pipeline import shipped
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
from grounded_diffusion.engine.cli.infer import main
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
        assert labels.shape == shape
        assert labels.max() <= len(record["objects"])
        for thing in record["objects"]:
            mask = np.asarray(Image.open(out / thing["mask"]))
            assert mask.shape == shape
            assert mask.sum() == thing["area"]
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
    assert len(records) == 200
    assert {len(record["objects"]) for record in records} == {1, 2, 3, 4}
    assert records[4]["prompt"] == "a photograph of the sea"
    assert records[4]["seed"] == 4
    assert "masks are read at step 1 of 1, timestep " in run.stderr
    assert "images/s" in run.stderr
    assert "200 images with" in run.stdout
    assert "\x1b" not in run.stderr  # plain lines, not on a terminal


def test_importing_the_engine_is_quick():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import grounded_diffusion.engine"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in run.stderr.splitlines() if line.endswith("| grounded_diffusion.engine")]
    assert int(line.split("|")[1]) < 1_000_000  # microseconds
    assert not any(f" {name}\n" in run.stderr for name in ("onnxruntime", "tokenizers", "PIL", "rich", "torch"))


@pytest.mark.parametrize("ask", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on(tiny_bundle, tmp_path, ask):
    """The same command finishes what is missing, with the bytes of an undisturbed run."""
    prompts, log = tmp_path / "prompts.txt", tmp_path / "log.jsonl"
    prompts.write_text(mixed_prompts(24))
    options = ["--model", str(tiny_bundle), "--prompts", str(prompts), "--steps", "8", "--batch=2", "--shard-size=4"]
    options += ["--threads", "1"]
    command = [sys.executable, "-m", "grounded_diffusion.engine.cli.infer", *options]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    run = subprocess.Popen([*command, "--out", str(broken), "--log", str(log)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((broken / "shards").glob("0*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(ask)
    asked = time.monotonic()
    assert run.wait(60) == 75
    assert time.monotonic() - asked < 10
    assert f"interrupted by {ask.name}; " in run.stderr.read()
    assert json.loads(log.read_text().splitlines()[-1])["status"] == "interrupted"
    assert 1 <= len(list((broken / "shards").glob("0*.json"))) < 6
    assert not (broken / "metadata.jsonl").exists()
    assert not list(broken.rglob("*.lock"))
    assert main([*options, "--out", str(broken)]) == 0
    assert main([*options, "--out", str(whole)]) == 0
    assert len(check_masks(whole)) == 24
    assert tree(broken) == tree(whole)


SLOW = """
import sys, time
from grounded_diffusion.engine.cli import infer as cli
from grounded_diffusion.engine.backends import onnxruntime_cpu as onnxruntime_backend
def run(self, graph, inputs):
    print("busy", flush=True)
    time.sleep(100)
onnxruntime_backend.OnnxRuntimeBackend.run = run
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_a_model_that_takes_long_is_not_waited_for(tiny_bundle, tmp_path, signals):
    """SIGTERM ends the command within 10 seconds, a second one at once; what is left does no harm."""
    options = ["--model", str(tiny_bundle), *PROMPT, "--steps", "1", "--out", str(tmp_path / "out")]
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "busy\n"
    asked = time.monotonic()
    for _ in range(signals):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert run.wait(60) == 75
    assert time.monotonic() - asked < 10
    assert (signals == 1) == (time.monotonic() - asked > 5)
    assert "interrupted by SIGTERM; what is not finished is dropped" in run.stderr.read()
    assert main(options) == 0
    assert len(check_masks(tmp_path / "out")) == 1
    assert not list(tmp_path.rglob("*.lock"))
    assert not list(tmp_path.rglob(".partial"))


def tree(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, *options):
    """(exit status, the one line on standard error)."""
    status = main([str(option) for option in options])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("gd-infer: ")
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
    "format": ((*PROMPT, "--format", "pascal"), "invalid choice: 'pascal'"),
    "quality": ((*PROMPT, "--jpeg-quality", "0"), "--jpeg-quality must be"),
    "filter": ((*PROMPT, "--min-area", "3"), "--min-area must be"),
    "attempts": ((*PROMPT, "--attempts", "0"), "--attempts must be"),
    "shard size": ((*PROMPT, "--shard-size", "0"), "--shard-size must be"),
    "shard": ((*PROMPT, "--shard", "4/4"), "worker 4 of 4"),
    "overwrite of a share": ((*PROMPT, "--shard", "0/4", "--overwrite"), "would remove what other workers make"),
    "workers": ((*PROMPT, "--workers", "2"), "--workers is for --ray"),
    "no class": ((*PROMPT, "--format", "voc", "--names", "coco", "--prompt", "a [unicorn]"), "'unicorn' is not among"),
    "no class of that name": ((*PROMPT, "--format", "voc", "--names", "absent"), "absent"),
    "metrics": ((*PROMPT, "--metrics-file", "absent/x.prom"), "cannot write absent/x.prom"),
    "metrics option": ((*PROMPT, "--metrics-file", "absent/x.prom"), "give --metrics-file a file in a folder that"),
    "metrics port": ((*PROMPT, "--metrics-port", "x"), "--metrics-port must be a port"),
    "shard without scheduler": ((*PROMPT, "--shard", "auto"), "--shard auto finds no scheduler"),
    "how to shard": ((*PROMPT, "--shard", "1"), "--shard takes I/N"),
    "bounds": ((*PROMPT, "--min-area", "0.5", "--max-area", "0.4"), "--min-area 0.5 is over --max-area 0.4"),
    "steps by option": ((*PROMPT, "--steps", "0"), "--steps must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tiny_bundle, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    status, line = fails(capsys, "--model", tiny_bundle, "--out", "out", *options)
    assert status == 2
    assert message in line
    assert not list(tmp_path.iterdir())


def test_bad_bundle(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for model, message in (("absent", "there is no bundle"), ("empty", "has no manifest.json")):
        status, line = fails(capsys, *PROMPT, "--model", tmp_path / model, "--out", tmp_path / "out")
        assert status == 2
        assert message in line
        assert not (tmp_path / "out").exists()


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
        ((*run, "/proc/out"), "cannot write"),
        ((*run, tmp_path / "out", "--prompt", "a [cat]"), "prompts was"),
        ((*run, tmp_path / "out", "--seed", "8"), "seed was 7, now 8"),
    ):
        status, line = fails(capsys, *options)
        assert status == 2
        assert message in line
    assert len(check_masks(tmp_path / "out")) == 1
    assert main([str(o) for o in (*run, tmp_path / "out", "--overwrite", "--prompt", "a [cat]")]) == 0
    assert [record["prompt"] for record in check_masks(tmp_path / "out")] == ["a dog", "a cat"]


def test_long_prompts_warn_once(tiny_bundle, tmp_path, capsys):
    long = "a [dog] " + "and a cat next to a dragon " * 11 + "zzz"
    options = ("--model", tiny_bundle, "--prompt", long, "--prompt", long, "--steps", "1", "--out", tmp_path / "out")
    assert main([str(option) for option in options]) == 0
    said = capsys.readouterr().err
    assert said.count("over 77 tokens") == 1
    assert "zzz" in said
    assert "2 prompts in all are too long" in said


FORMATS = {"voc": "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt", "coco": "annotations/instances_train.json",
           "webdataset": "train-000001.tar", "hf-parquet": "data/train-00001-of-00002.parquet"}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_any_format_is_written_directly(tiny_bundle, tmp_path, name):
    """And goes on where it was: two workers' shards make one data set, with the classes of all prompts."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text(mixed_prompts(7))
    options = ["--model", str(tiny_bundle), "--prompts", str(prompts), "--steps", "1", "--shard-size", "4"]
    for worker in ("0/2", "1/2"):
        assert not (out / FORMATS[name]).exists()
        assert main([*options, "--format", name, "--out", str(out), "--shard", worker]) == 0
    assert (out / FORMATS[name]).exists()
    classes = json.loads((out / "run.json").read_text())["settings"]["classes"]
    assert list(classes) == sorted(NAMES)
    assert list(classes.values()) == list(range(1, 9))


def test_a_dry_run_writes_nothing(tiny_bundle, tmp_path, capsys):
    """Its sizes are those of the run."""
    options = ["--model", str(tiny_bundle), *PROMPT, "--images-per-prompt", "40", "--steps", "2", "--shard-size=16"]
    options += ["--threads", "1", "--sampler", "ddim"]
    out = tmp_path / "out"
    assert main([*options, "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["images"] == "40; 40 to make"
    assert told["shards"] == "3 of 16 images, in batches of 16; 0 are there"
    assert "images/s" in told["time"]
    assert "are free" in told["disk"]
    assert main([*options, "--out", str(out), "--shard", "1/3"]) == 0
    capsys.readouterr()
    assert main([*options, "--out", str(out), "--dry-run"]) == 0
    again = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert again["images"] == "40; 24 to make"
    assert again["shards"].endswith("1 are there")
    assert main([*options, "--out", str(out)]) == 0
    size = sum(file.stat().st_size for file in out.rglob("*/*") if file.is_file() and "preview" not in str(file))
    assert abs(float(told["disk"].split(",")[1].split()[0]) * 1000 * 40 / size - 1) < 0.1


def test_sizes():
    assert parse_size("512") == (512, 512)
    assert parse_size("512x768") == (512, 768)


def test_help_and_version(capsys):
    for option, text in (("--help", "exit status: 0 complete"), ("--version", "gd-infer 0.")):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


def test_shipped_model_comes_from_the_cache(tiny_checkpoint, tiny_bundle, tmp_path):
    key = shipped.checkpoint_key(tiny_checkpoint)
    cached = tmp_path / f"{tiny_checkpoint.name}-{key[:16]}"
    shutil.copytree(tiny_bundle, cached)
    said = []
    assert shipped.cached_export(tiny_checkpoint, tmp_path, said.append) == cached
    assert not said


def test_the_cache_key_is_the_checkpoint_and_its_exporter(tiny_checkpoint, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert shipped.checkpoint_key(copy) == shipped.checkpoint_key(tiny_checkpoint)
    (copy / "model_index.json").write_text("{}")
    assert shipped.checkpoint_key(copy) != shipped.checkpoint_key(tiny_checkpoint)
    shutil.copytree(shipped.PACKAGE / "export", tmp_path / "export")
    before = shipped.checkpoint_key(copy)
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    assert shipped.checkpoint_key(copy) == before
    (tmp_path / "export" / "cpu.py").write_text("")
    assert shipped.checkpoint_key(copy) != before


def test_cache_folder_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shipped.cache_folder() == tmp_path / "grounded-diffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert shipped.cache_folder() == tmp_path / "home" / ".cache" / "grounded-diffusion"


def test_export_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "NEEDED", ("a_module_nobody_has",))
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UsageError, match=r"pip install 'grounded-diffusion\[export\]', or give `model` a bundle"):
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
