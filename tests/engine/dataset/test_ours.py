"""Outputs: nothing of anybody else's is removed, replaced or followed to, and --overwrite begins anew only once."""

import json
import os
import shutil
import signal
import stat
import time

import pytest
from helpers import null_backend as null

from grounded_diffusion.engine.cli import dataset, prompts
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.storage.remote import FsspecStorage


def tree(folder):
    """Every file below a folder with its content, and every link with its target."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes() for path in paths
    }


@pytest.fixture
def infer(tiny_bundle):
    """gd-infer of six samples in three shards with a model that draws nothing."""
    options = ["--model", tiny_bundle, "--prompt", "a [dog] and a [cat]", "--images-per-prompt", "6", "--steps", "2",
               "--sampler", "ddim", "--batch", "2", "--shard-size", "2"]  # fmt: skip
    return lambda *more, backend=null.NullBackend: null.main([*options, *more], backend)


@pytest.fixture
def commands(infer, blobs, tmp_path):
    """Every command that takes --out and --overwrite for a data set; called with the output."""
    other = blobs.write(tmp_path / "other", [20, 21])
    run = lambda *arguments: dataset.main([str(argument) for argument in arguments])
    return {
        "infer": lambda out, *more: infer("--out", out, *more),
        "merge": lambda out, *more: run("merge", blobs.path, other, "--out", out, *more),
        "convert": lambda out, *more: run("convert", blobs.path, "--format", "coco", "--out", out, *more),
    }


def refused(capsys, status, *told):
    """That a command ended in one line which says this."""
    said = capsys.readouterr()
    assert status == 2
    assert said.err.count("\n") == 1
    for words in told:
        assert words in said.err


COMMANDS = ("infer", "merge", "convert")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", "[]"), ("run.json", "{}"), ("run.json", '{"settings": {}}'), ("gd-dataset.json", ""),
     ("gd-dataset.json", "{}"), ("manifest.json", "{}"), ("index.html", "")],
)  # fmt: skip
def test_a_file_of_a_familiar_name_makes_no_folder_ours(commands, tmp_path, capsys, command, name, content):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text(content)
    (mine / "thesis.tex").write_text("years")
    before = tree(mine)
    refused(capsys, commands[command](mine, "--overwrite"), str(mine))
    assert tree(mine) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("foreign", ["thesis.tex", "images/notes.txt", "shards/000007.json", "shards/x.json", "empty/"])
def test_what_lies_beside_ours_is_named_and_stays(commands, tmp_path, capsys, command, foreign):
    out = tmp_path / "out"
    assert commands[command](out) == 0
    file = out / foreign
    file.parent.mkdir(exist_ok=True)
    file.mkdir() if foreign.endswith("/") else file.write_text("years")
    before = tree(out)
    change = ["--seed", "8"] if command == "infer" else []
    capsys.readouterr()
    refused(capsys, commands[command](out, "--overwrite", *change), foreign, "nothing is removed", "another --out")
    assert tree(out) == before
    assert file.exists()
    file.rmdir() if file.is_dir() else file.unlink()
    assert commands[command](out, "--overwrite", *change) == 0
    assert dataset.main(["verify", str(out)]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("made_by", COMMANDS)
def test_a_command_replaces_only_what_it_makes(commands, tmp_path, capsys, command, made_by):
    out = tmp_path / "out"
    assert commands[made_by](out) == 0
    before = tree(out)
    capsys.readouterr()
    status = commands[command](out, "--overwrite")
    if command == made_by:
        assert status == 0
        assert tree(out) == before
    else:
        refused(capsys, status, "was made by gd-")
        assert tree(out) == before


@pytest.mark.parametrize("command", [*COMMANDS, "prompts"])
def test_an_empty_out_is_not_the_current_folder(commands, tmp_path, monkeypatch, capsys, command):
    here = tmp_path / "here"
    here.mkdir()
    (here / "run.json").write_text('{"format": "folder", "settings": {}}')
    monkeypatch.chdir(here)
    if command == "prompts":
        status = prompts.main(["--vocabulary", "voc", "--overwrite", "--out", ""])
    else:
        status = commands[command]("", "--overwrite")
    refused(capsys, status, "empty, which would be the current folder")
    assert [path.name for path in here.iterdir()] == ["run.json"]


class Dying(null.NullBackend):
    """Is killed once a shard of `out` is made."""

    out = None

    def run(self, graph, inputs):
        time.sleep(0.01)
        if list(Dying.out.glob("shards/0*.json")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(graph, inputs)


def in_fork(work):
    """The exit status of what `work` does in a process of its own."""
    if not (pid := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_an_overwriting_command_that_was_killed_goes_on(infer, tmp_path, capsys):
    """As in a job that is queued again: it removes the other run once, and then finishes its own."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    new = ["--images-per-prompt", "40", "--overwrite"]
    assert infer("--out", out) == 0
    Dying.out = out
    assert in_fork(lambda: infer("--out", out, *new, backend=Dying)) == -signal.SIGKILL
    made = {path: path.stat().st_ino for path in (out / "shards").glob("0*.json")}
    assert 0 < len(made) < 20
    assert not (out / "metadata.jsonl").exists()
    assert infer("--out", out, *new) == 0
    assert {path: path.stat().st_ino for path in made} == made
    assert infer("--out", whole, "--images-per-prompt", "40") == 0
    assert tree(out) == tree(whole)
    assert infer("--out", out, *new) == 0
    assert {path: path.stat().st_ino for path in made} == made  # finished: it has nothing left to do


@pytest.mark.parametrize("kept", [1, 4, 12, 20])
def test_killed_while_the_other_run_is_removed(infer, tmp_path, capsys, monkeypatch, kept):
    """The other run can then not be taken for whole, and the new command goes on removing."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert infer("--out", out) == 0

    def remove(self, path, left=[kept]):  # noqa: B006 - counts the calls
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, path)

    real = LocalStorage.remove
    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "remove", remove)
        assert in_fork(lambda: infer("--out", out, "--seed", "8", "--overwrite")) == -signal.SIGKILL
    capsys.readouterr()
    refused(capsys, infer("--out", out), "seed was 8, now 7")
    assert infer("--out", out, "--seed", "8") == 0
    assert infer("--out", whole, "--seed", "8") == 0
    assert tree(out) == tree(whole)


def test_a_shard_that_was_being_put_in_place_is_ours(infer, tmp_path, monkeypatch):
    """Its files have no record, but .partial/ says whose they are."""
    out = tmp_path / "out"

    def stream(self, path):
        if path == "shards/000001.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, path)

    real = LocalStorage._stream
    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "_stream", stream)
        assert in_fork(lambda: infer("--out", out)) == -signal.SIGKILL
    assert (out / "images/000/000002.png").exists()
    assert not (out / "shards/000001.json").exists()
    assert infer("--out", out, "--seed", "8", "--overwrite") == 0
    assert dataset.main(["verify", str(out)]) == 0


def secret(tmp_path):
    """A folder that no data set has to do with."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "000099.js").write_text("mine")
    (folder / "000000.png").write_bytes(b"mine")
    return folder


@pytest.mark.parametrize("name", ["preview", "shards", "images", ".partial", "objects/000"])
@pytest.mark.parametrize("command", ["preview", "card", "split", "verify", "convert"])
def test_links_are_not_followed(data, tmp_path, capsys, name, command):
    outside = secret(tmp_path)
    shutil.rmtree(data / name, ignore_errors=True)
    (data / name).symlink_to(outside)
    before = tree(outside)
    more = {"split": ["--val", "0.5"], "convert": ["--format", "coco", "--out", str(tmp_path / "coco")]}
    status = dataset.main([command, str(data), *more.get(command, [])])
    said = capsys.readouterr()
    assert tree(outside) == before
    reads = {"preview": {"preview", ".partial"}, "card": {"shards", "images", ".partial"}, "split": {".partial"},
             "verify": {"shards", "images", "objects/000"}, "convert": {"images", "objects/000"}}  # fmt: skip
    if name in reads[command]:
        assert status in (1, 2)
        assert f"{data / name} is a symbolic link" in said.out + said.err or "has no finished shard" in said.err


def test_a_run_does_not_follow_links(infer, tmp_path, capsys):
    outside, out = secret(tmp_path), tmp_path / "out"
    assert infer("--out", out) == 0
    shutil.rmtree(out / "preview")
    (out / "preview").symlink_to(outside)
    before = tree(outside)
    for options in (["--seed", "8", "--overwrite"], []):
        assert infer("--out", out, *options) in (1, 2)
        assert tree(outside) == before
        assert (out / "preview").is_symlink()


@pytest.mark.parametrize("name", ["../secret/000000.png", "/etc/passwd"])
def test_a_record_cannot_put_a_foreign_picture_into_the_card(data, tmp_path, capsys, name):
    secret(tmp_path)
    file = data / "shards/000000.json"
    record = json.loads(file.read_text())
    record["rows"][0]["image"] = name
    file.write_text(json.dumps(record))
    assert dataset.main(["card", str(data)]) in (1, 2)
    said = capsys.readouterr().err
    assert "lies outside" in said
    assert said.count("\n") == 1
    assert not (data / "card.png").exists()


SPECIAL = {
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to(path.with_name("linked")),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("command", ["metrics", "plot", "prompts"])
def test_a_special_file_stays_special(infer, data, tmp_path, capsys, kind, command):
    suffix = {"metrics": ".prom", "plot": ".svg", "prompts": ".jsonl"}[command]
    target = tmp_path / f"target{suffix}"
    (tmp_path / "linked").write_text("mine")
    try:
        SPECIAL[kind](target)
    except PermissionError:
        pytest.skip("devices can only be made by root")
    before = target.lstat()
    if command == "metrics":
        status = infer("--out", tmp_path / "out", "--metrics-file", target)
    elif command == "plot":
        status = dataset.main(["stats", str(data), "--plot", str(target)])
    else:
        status = prompts.main(["--vocabulary", "voc", "--out", str(target), "--overwrite"])
    refused(capsys, status, str(target))
    assert (target.lstat().st_mode, target.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert (tmp_path / "linked").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_metrics_file_replaces_nothing_else(infer, tmp_path, capsys):
    given = tmp_path / "prompts.txt"
    given.write_text("a [dog]\n")
    out, foreign = tmp_path / "out", tmp_path / "other.prom"
    foreign.write_text("# HELP node_load1 1m load average.\n")
    log = tmp_path / "notes.txt"
    log.write_text("mine\n")
    for options in (["--metrics-file", given], ["--metrics-file", out / "run.json"], ["--metrics-file", foreign],
                    ["--log", log], ["--log", given]):  # fmt: skip
        refused(capsys, infer("--prompts", given, "--out", out, *options), str(options[1]))
    assert given.read_text() == "a [dog]\n"
    assert log.read_text() == "mine\n"
    assert foreign.read_text().startswith("# HELP node_load1") and not (out / "metadata.jsonl").exists()


def test_temporary_names_are_new_ones(infer, data, tmp_path):
    """A file that has the name of a temporary one is nobody's leftover."""
    for name in ("m.prom.tmp", "s.svg.tmp", "p.jsonl.tmp", ".m.prom.tmp"):
        (tmp_path / name).write_text("mine")
    assert infer("--out", tmp_path / "out", "--metrics-file", tmp_path / "m.prom") == 0
    assert dataset.main(["stats", str(data), "--plot", str(tmp_path / "s.svg")]) == 0
    assert prompts.main(["--vocabulary", "voc", "--out", str(tmp_path / "p.jsonl")]) == 0
    assert {path.read_text() for path in tmp_path.glob("*.tmp")} == {"mine"}
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")) == [
        "data", "m.prom", "out", "p.jsonl", "s.svg",
    ]  # fmt: skip
    assert (tmp_path / "m.prom").stat().st_mode & 0o444 == 0o444  # node_exporter runs as another user


def test_prompts_do_not_replace_what_they_are_made_of(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("lamp\n")
    other = tmp_path / "run.json"
    other.write_text("{}")
    refused(capsys, prompts.main(["--names", str(names), "--out", str(names), "--overwrite"]), "files to read")
    refused(capsys, prompts.main(["--names", str(names), "--out", str(other), "--overwrite"]), ".jsonl or .txt")
    assert names.read_text() == "lamp\n"
    assert other.read_text() == "{}"


URL = "memory://mends"


@pytest.fixture
def remote(data):
    """The shared data set behind a URL."""
    storage = FsspecStorage(URL)
    for path in storage.walk():
        storage.remove(path)
    for name, content in tree(data).items():
        storage.put(name, content)
    return storage


def test_data_sets_behind_urls(remote, data, tmp_path, capsys, monkeypatch):
    """Read, checked and looked at as folders are; what is made of them is made here."""
    monkeypatch.chdir(tmp_path)
    for command in (["verify"], ["status"], ["stats"], ["preview"], ["card"], ["split", "--val", "0.5"], ["verify"]):
        assert dataset.main([command[0], URL, *command[1:]]) == 0, capsys.readouterr().err
    assert "9 records, no problems" in capsys.readouterr().out
    for out in (tmp_path / "a", tmp_path / "b"):
        source = URL if out.name == "a" else str(data)
        assert dataset.main(["split", str(data), "--val", "0.5"]) == 0
        assert dataset.main(["convert", source, "--format", "voc", "--out", str(out)]) == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    remote.put("images/000/000003.png", b"damaged")
    remote.remove("masks/000/000004.png")
    capsys.readouterr()
    assert dataset.main(["verify", URL]) == 1
    said = capsys.readouterr().out
    assert f"{URL}/images/000/000003.png: has changed" in said
    assert f"{URL}/masks/000/000004.png is missing" in said


@pytest.mark.parametrize("command", ["convert", "merge", "prompts", "plot"])
def test_what_is_written_here_takes_no_url(blobs, data, tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    url = "s3://bucket/prefix"
    if command == "prompts":
        status = prompts.main(["--vocabulary", "voc", "--out", url])
    else:
        more = {"convert": [data, "--format", "coco", "--out", url], "merge": [data, blobs.path, "--out", url],
                "plot": [data, "--plot", url]}[command]  # fmt: skip
        status = dataset.main([str(word) for word in ("stats" if command == "plot" else command, *more)])
    refused(capsys, status, "is a URL, and this takes a path of this machine")
    assert sorted(tmp_path.iterdir()) == before
