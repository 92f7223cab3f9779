"""What is finished of a shard in hand outlives Ctrl-C, SIGTERM and SIGKILL, and the bytes do not show it."""

import json
import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from helpers import null_backend as null

from grounded_diffusion.bundle import VAE_DECODER
from grounded_diffusion.engine.dataset.formats import Encoded
from grounded_diffusion.engine.dataset.formats.folder import FolderFormat
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.pipeline.job import Job
from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.runs import keep
from grounded_diffusion.errors import StorageError

SAMPLES = 24


class CountingBackend(null.FailingBackend):
    """Notes in a file how many images it has drawn, and takes a while."""

    file = Path()

    def run(self, graph, inputs):
        if graph == VAE_DECODER:
            time.sleep(0.02)
            with self.file.open("a") as stream:
                stream.write("x" * len(inputs["latents"]))
        return super().run(graph, inputs)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function that tells how many images the model has drawn since it was last asked."""
    file = tmp_path / "drawn"
    monkeypatch.setattr(CountingBackend, "file", file)

    def count():
        images = len(file.read_text()) if file.exists() else 0
        file.unlink(missing_ok=True)
        return images

    return count


@pytest.fixture
def command(tiny_bundle):
    """One shard of two-image batches, a fifth of whose samples fail and are tried again; duplicates are refused."""
    return ["--model", tiny_bundle, "--prompt", "a [dog] and a [cat]", "--images-per-prompt", SAMPLES, "--steps", 2,
            "--sampler", "ddim", "--guidance-interval", 0, 1, "--batch", 2, "--shard-size", SAMPLES, "--attempts", 3,
            "--min-distance", 12, "--lanes", 1, "--threads", 1, "--out"]  # fmt: skip


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(arguments):
    """gd-infer in a fork that keeps what it has every 0.1 seconds; returns its pid."""
    if pid := os.fork():
        return pid
    try:
        keep.EVERY = 0.1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(null.main(arguments, CountingBackend))
    finally:
        os._exit(1)


def drawn_so_far():
    return len(CountingBackend.file.read_text()) if CountingBackend.file.exists() else 0


def stop_after(arguments, images, number):
    """Start the command and send it a signal once so many images are drawn; returns the exit status.

    It may have ended before.
    """
    pid = start(arguments)
    while drawn_so_far() < images:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def expected(command, tmp_path, drawn):
    """(files of an undisturbed run, images that it draws)."""
    assert null.main([*command, tmp_path / "whole"], CountingBackend) in (0, 3)
    return tree(tmp_path / "whole"), drawn()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_finished_is_not_made_again(command, tmp_path, expected, drawn, number):
    files, images = expected
    out = tmp_path / "out"
    assert stop_after([*command, out], 12, number) == 75
    before = drawn()
    assert null.main([*command, out], CountingBackend) in (0, 3)
    assert tree(out) == files
    assert before + drawn() <= images + 4  # the batch under way, and the one that waits behind it


@pytest.mark.parametrize("images", [6, 14, 26])
def test_what_was_kept_outlives_a_kill(command, tmp_path, expected, drawn, images):
    """26 are more than the first attempts."""
    files, all_images = expected
    out = tmp_path / "out"
    assert stop_after([*command, out], images, signal.SIGKILL) == -signal.SIGKILL
    before = drawn()
    assert null.main([*command, out], CountingBackend) in (0, 3)
    assert tree(out) == files
    assert before + drawn() < all_images + before / 2 + 12


def test_stopped_again_and_again(command, tmp_path, expected, drawn):
    """Each time a few images further: the run ends, though no part of it is as long as a shard."""
    files, _ = expected
    out, status, parts = tmp_path / "out", 75, 0
    while status == 75:
        CountingBackend.file.unlink(missing_ok=True)
        status, parts = stop_after([*command, out], 8, signal.SIGTERM), parts + 1
    assert status in (0, 3)
    assert tree(out) == files
    assert parts >= 3


@pytest.fixture
def stopped(command, tmp_path, expected):
    """A run that was stopped with something kept."""
    out = tmp_path / "out"
    assert stop_after([*command, out], 12, signal.SIGTERM) == 75
    CountingBackend.file.unlink()
    assert list((out / keep.KEPT).iterdir())
    return out


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"\0" + content])
def test_what_is_damaged_is_made_again(command, stopped, expected, damage):
    for file in (stopped / keep.KEPT).iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert null.main([*command, stopped], CountingBackend) in (0, 3)
    assert tree(stopped) == expected[0]


def test_another_run_takes_nothing_over(command, stopped, drawn):
    """Even where somebody has removed all else by hand."""
    for name in ("run.json", "shards"):
        path = stopped / name
        path.unlink() if path.is_file() else [file.unlink() for file in path.iterdir()]
    assert null.main([*command, stopped, "--seed", "8"], CountingBackend) in (0, 3)
    assert json.loads((stopped / "run.json").read_text())["settings"]["seed"] == 8
    assert drawn() >= SAMPLES


def test_overwriting_removes_what_was_kept(command, stopped, drawn):
    assert null.main([*command, stopped, "--seed", "8", "--overwrite"], CountingBackend) in (0, 3)
    assert drawn() >= SAMPLES
    assert not (stopped / ".partial").exists()


def test_it_says_what_was_kept(command, stopped, capsys):
    assert null.main([*command, stopped], CountingBackend) in (0, 3)
    assert "images were made before and kept" in capsys.readouterr().err


def test_a_run_goes_on_where_nothing_can_be_kept(command, tmp_path, expected, monkeypatch):
    put = LocalStorage.put

    def refuse(self, path, content):
        if path.startswith(keep.KEPT):
            raise StorageError("no")
        put(self, path, content)

    monkeypatch.setattr(LocalStorage, "put", refuse)
    monkeypatch.setattr(keep, "EVERY", 0.05)
    assert null.main([*command, tmp_path / "out"], CountingBackend) in (0, 3)
    assert tree(tmp_path / "out") == expected[0]


def test_nothing_is_left_of_a_sample_that_cannot_be_encoded(command, tmp_path, expected, monkeypatch):
    """Its batch and those after it are not kept; the shard is made as ever."""

    def encode(self, record):
        if record.index == 3:
            raise OSError("encoder error -2")
        return well(self, record)

    well = FolderFormat.encode
    monkeypatch.setattr(FolderFormat, "encode", encode)
    monkeypatch.setattr(keep, "EVERY", 0.02)
    assert null.main([*command, tmp_path / "out"], CountingBackend) == 3
    record = json.loads((tmp_path / "out/shards/000000.json").read_text())
    assert [entry["reason"] for entry in record["quarantined"]] == ["cannot be encoded: encoder error -2"]


def test_a_kept_file_holds_any_bytes():
    """Contents of files are neither text nor the same length."""
    rng = np.random.default_rng(0)
    job = Job.of(3, Prompt("a dog", ("dog",)), 0, 7)
    samples = [Encoded({"a": rng.bytes(1000), "b/c": b"", "d": b"\n\n"}, {"id": "ü", "n": [1.5]}), Encoded({}, {})]
    outcomes = []
    for sample in samples:
        future = Future()
        future.set_result(sample)
        outcomes.append([keep.Outcome(job, future, 2**63), keep.Outcome(job, kind="rejected", reason="no")])
    ((first, refused), (second, _)) = keep.decode(b"run", keep.encode(b"run", outcomes))
    assert (first["sample"], second["sample"]) == tuple(samples)
    assert (first["hash"], refused["reason"], first["index"]) == (2**63, "no", 3)
    assert keep.decode(b"other", keep.encode(b"run", outcomes)) == []
