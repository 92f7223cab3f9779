"""make_dataset: what the command makes, byte for byte, from Python; progress, interruption, shares."""

import json
import logging
import threading

import pytest
from helpers.null_backend import FailingBackend, NullBackend, backend_of

from grounded_diffusion.engine import Filters, FormatOptions, Options, Prompt, RunConfig, make_dataset
from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.runs import progress
from grounded_diffusion.errors import UsageError

TEXT = "a photograph of a [dog] and a [cat]"
SEA = Prompt("the sea", ("sea", "rocket"), seed=3, count=4)


def tree(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(bundle, out, **fields):
    """A run of twelve samples in shards of four."""
    options = Options(steps=2, images_per_prompt=12, batch=2)
    return RunConfig(**dict(out=out, prompts=TEXT, model=bundle, options=options, shard_size=4, threads=1) | fields)


@pytest.fixture
def null(monkeypatch):
    """Instead of the network, arithmetic."""
    monkeypatch.setitem(BACKENDS, DEFAULT_BACKEND, backend_of(NullBackend))


CASES = {
    "folder": ({}, []),
    "voc": (
        dict(format="voc", format_options=FormatOptions(void_border=1, jpeg_quality=80),
             filters=Filters(min_score=0.2, require_masks=True), attempts=2),
        ["--format=voc", "--void-border=1", "--jpeg-quality=80", "--min-score=0.2", "--require-masks", "--attempts=2"],
    ),
    "webdataset": (dict(format="webdataset", format_options=FormatOptions(png=True)), ["--format=webdataset", "--png"]),
    "coco": (
        dict(format="coco", format_options=FormatOptions(names=("sea", "rocket", "dog", "cat"))),
        ["--format=coco", "--names=names.txt"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_the_command(tiny_bundle, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    fields, options = CASES[case]
    (tmp_path / "names.txt").write_text("sea\nrocket\ndog\ncat\n")
    (tmp_path / "prompts.txt").write_text(f"# one\n{TEXT}\n")
    line = json.dumps({"prompt": "the sea", "objects": ["sea", "rocket"], "seed": 3, "count": 4})
    given = ["--prompts=prompts.txt", f"--prompt={line}", f"--model={tiny_bundle}", "--steps=2", "--batch=2",
             "--shard-size=4", "--threads=1", "--images-per-prompt=3", "--out=command"]  # fmt: skip
    status = main([*given, *options])
    result = make_dataset(RunConfig(
        prompt_file="prompts.txt", prompts=[SEA], out="python", model=tiny_bundle, shard_size=4, threads=1,
        options=Options(steps=2, batch=2, images_per_prompt=3), **fields,
    ))  # fmt: skip
    assert tree(tmp_path / "python") == tree(tmp_path / "command")
    assert result.finished
    assert result.path == "python"
    assert result.samples == 7
    assert result.accepted + result.rejected + result.quarantined == 7
    assert status == (0 if result.accepted == 7 else 3)


def test_progress_is_told_in_the_callers_thread(tiny_bundle, tmp_path, null, capsys):
    told = []
    result = make_dataset(
        small(tiny_bundle, tmp_path / "out"), on_progress=lambda p: told.append((p, threading.get_ident()))
    )
    assert {thread for _, thread in told} == {threading.get_ident()}
    steps = [step for step, _ in told]
    assert len(steps) == 6 + 1
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total, steps[-1].accepted) == (12, 12, 12)
    assert steps[-1].seconds_left == 0
    assert result.accepted == 12
    assert capsys.readouterr() == ("", "")


def test_what_a_callback_raises_ends_the_run_which_goes_on_later(tiny_bundle, tmp_path, null):
    make_dataset(small(tiny_bundle, tmp_path / "whole"))

    def stop(step):
        if step.done >= 6:
            raise KeyboardInterrupt

    config = small(tiny_bundle, tmp_path / "out", log=tmp_path / "log")
    with pytest.raises(KeyboardInterrupt):
        make_dataset(config, on_progress=stop)
    assert not open_storage(tmp_path / "out").claims()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["status"] == "interrupted"
    begun = []
    assert make_dataset(config, on_progress=begun.append).finished
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert begun[0].done > 2
    with pytest.raises(UsageError, match="seed was 7, now 8; give the same command to go on, or `overwrite`"):
        make_dataset(small(tiny_bundle, tmp_path / "out", options=Options(steps=2, images_per_prompt=12, seed=8)))


def test_shares_make_one_data_set(tiny_bundle, tmp_path, null):
    make_dataset(small(tiny_bundle, tmp_path / "whole"))
    first = make_dataset(small(tiny_bundle, tmp_path / "out", shard="0/2"))
    assert not first.finished
    assert (first.samples, first.accepted, first.masks) == (8, 8, 16)
    assert make_dataset(small(tiny_bundle, tmp_path / "out", shard="1/2")).finished
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_is_lost_is_counted(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, DEFAULT_BACKEND, backend_of(FailingBackend))
    result = make_dataset(small(tiny_bundle, tmp_path / "out", attempts=1))
    assert result.quarantined > 0
    assert result.accepted == 12 - result.quarantined
    assert result.reasons == {"the latents at step 1 of 2 are not finite": result.quarantined}


def test_a_bar_where_there_is_a_terminal(tiny_bundle, tmp_path, null, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    make_dataset(small(tiny_bundle, tmp_path / "out"))
    assert "generating" in (said := capsys.readouterr().err)
    assert "12/12" in said


def test_lines_for_the_log_where_there_is_none(tiny_bundle, tmp_path, null, caplog, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with caplog.at_level(logging.INFO, "grounded_diffusion"):
        make_dataset(small(tiny_bundle, tmp_path / "out"))
    assert "12 images with dpmpp-2m; masks are read at step " in caplog.messages[0]
    assert any(line.startswith("12 of 12 images, ") for line in caplog.messages)
    assert capsys.readouterr() == ("", "")
