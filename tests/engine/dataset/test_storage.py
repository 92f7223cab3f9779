"""Local output: whole files, records last, one worker a shard, whenever somebody is killed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grounded_diffusion.engine.dataset.ours import clear
from grounded_diffusion.engine.dataset.runfile import run_json
from grounded_diffusion.engine.dataset.shards import encode_shard
from grounded_diffusion.engine.dataset.storage.base import FINISH, record_path
from grounded_diffusion.engine.dataset.storage.local import LocalStorage
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import StorageError, UsageError

SHARDS, FILES = 6, 5


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "deep" / "run")


def tree(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_files(shard):
    """The files of a shard; every other has them in a folder of its own."""
    folder = f"images/{shard:03d}" if shard % 2 else "images"
    return {f"{folder}/{shard}-{i}.png": bytes([shard, i]) * 20_000 for i in range(FILES)}


def make_all(storage):
    """What a worker does: each shard that has no record, and at the end the lists."""
    for shard in range(SHARDS):
        with storage.claim(shard) as mine:
            if mine and not storage.exists(record_path(shard)):
                storage.commit(shard, iter(shard_files(shard).items()), b"record %d" % shard)
    with storage.claim(FINISH) as mine:
        if mine and all(storage.exists(record_path(shard)) for shard in range(SHARDS)):
            with storage.create("metadata.jsonl") as stream:
                for shard in range(SHARDS):
                    stream.write(storage.read(record_path(shard)))
            storage.clean()


def in_child(work):
    """Run `work` in a fork; returns its pid."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The tree of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("storage") / "run"
    make_all(open_storage(folder))
    return tree(folder)


def test_nothing_is_created_before_it_is_needed(storage, tmp_path):
    assert isinstance(storage, LocalStorage)
    assert storage.root == str(tmp_path / "deep" / "run")
    assert storage.list("shards") == []
    assert not storage.exists("run.json")
    assert storage.claims() == {}
    storage.remove("run.json")
    with pytest.raises(FileNotFoundError):
        storage.read("run.json")
    assert list(tmp_path.iterdir()) == []


def test_files(storage):
    storage.put("images/b.png", b"b")
    storage.put("images/a.png", b"old")
    storage.put("images/a.png", b"a")
    storage.put("images/deeper/c.png", b"c")
    assert storage.list("images") == ["a.png", "b.png"]
    assert storage.read("images/a.png") == b"a"
    assert storage.exists("images/a.png")
    assert not storage.exists("images")
    storage.remove("images/deeper/c.png")
    assert not (storage.folder / "images/deeper").exists()
    assert storage.list("images") == ["a.png", "b.png"]
    storage.clean()
    assert tree(storage.folder) == {"images/a.png": b"a", "images/b.png": b"b"}
    with pytest.raises(StorageError, match="outside"):
        storage.put("../a.png", b"a")


def test_a_stream_is_there_at_its_end_or_not_at_all(storage):
    storage.put("list.txt", b"old")
    with storage.create("list.txt") as stream:
        stream.write(b"new")
        assert storage.read("list.txt") == b"old"
    assert storage.read("list.txt") == b"new"
    with pytest.raises(ValueError, match="of the caller"), storage.create("list.txt") as stream:
        stream.write(b"newer")
        raise ValueError("a matter of the caller")
    assert tree(storage.folder) == {"list.txt": b"new"}


def test_a_shard_is_there_with_its_record(storage):
    storage.commit(1, shard_files(1).items(), b"{}")
    assert tree(storage.folder) == shard_files(1) | {"shards/000001.json": b"{}"}


def test_a_shard_that_cannot_be_packed_leaves_no_record(storage):
    def files():
        yield "images/0.png", b"0"
        raise ValueError("cannot be packed")

    with storage.claim(0), pytest.raises(ValueError, match="cannot be packed"):
        storage.commit(0, files(), b"{}")
    assert not storage.exists(record_path(0))
    assert not storage.exists("images/0.png")


def test_one_worker_holds_a_shard(storage):
    other = open_storage(storage.root)
    with storage.claim(3) as mine, other.claim(3) as theirs, other.claim(FINISH) as last:
        assert (mine, theirs, last) == (True, False, True)
        held = other.claims()
        assert set(held) == {"000003", "finish"}
        assert held["000003"]["started"].startswith("20")
        assert (held["000003"]["host"], held["000003"]["pid"]) == (socket.gethostname(), os.getpid())
    assert tree(storage.folder) == {}
    assert storage.claims() == {}


def test_a_dead_workers_claim_is_taken_over_with_its_leftovers(storage):
    def hold():
        with storage.claim(3):
            (storage.folder / ".partial/000003").mkdir(parents=True)
            (storage.folder / ".partial/000003/half.png").write_bytes(b"half")
            time.sleep(60)

    pid = in_child(hold)
    half = storage.folder / ".partial/000003/half.png"
    deadline = time.monotonic() + 10
    while not half.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with storage.claim(3) as mine:
        assert not mine
        assert storage.claims()["000003"]["pid"] == pid
        assert half.exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert storage.claims() == {}
    assert storage.exists("shards/000003.lock")
    with storage.claim(3) as mine:
        assert mine
        assert storage.claims()["000003"]["pid"] == os.getpid()
        assert not half.exists()


def test_a_claim_is_never_held_twice(storage):
    counter = storage.folder.parent / "counter"
    counter.parent.mkdir(parents=True)
    counter.write_text("0")

    def work():
        done = 0
        while done < 40:
            with storage.claim(0) as mine:
                if mine:
                    before = int(counter.read_text())
                    time.sleep(0.0005)
                    counter.write_text(str(before + 1))
                    done += 1

    pids = [in_child(work) for _ in range(3)]
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert counter.read_text() == "120"
    assert tree(storage.folder) == {}


def test_workers_killed_at_any_moment_leave_what_one_undisturbed_worker_does(tmp_path, uninterrupted):
    storage, generator, kills = open_storage(tmp_path / "run"), random.Random(5), 0
    while kills < 60:
        pids = [in_child(lambda: make_all(storage)) for _ in range(2)]
        time.sleep(generator.uniform(0.0, 0.03))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        there = tree(storage.folder)
        for shard in range(SHARDS):
            if record_path(shard) in there:
                assert shard_files(shard).items() <= there.items()
        if there.keys() >= uninterrupted.keys():
            for path in uninterrupted:
                storage.remove(path)
    make_all(storage)
    assert tree(storage.folder) == uninterrupted
    assert not (storage.folder / ".partial").exists()


def on_tmpfs(folder, options, script):
    """Run a script, which gets the folder, where a tmpfs of these options is mounted on it; returns what it prints."""
    folder.mkdir()
    inner = f'mount -t tmpfs -o {options} none "$0" && exec "$1" -c "$2" "$0"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inner, folder, sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_says_what_the_shard_needs(tmp_path):
    script = """if True:
        import json, sys
        from grounded_diffusion.engine.dataset.storage.open import open_storage
        from grounded_diffusion.errors import DiskFullError
        storage = open_storage(sys.argv[1] + "/run")
        with storage.claim(0):
            storage.commit(0, [("a.png", bytes(400_000))], b"{}")
        try:
            with storage.claim(1):
                storage.commit(1, ((f"{i}.png", bytes(300_000)) for i in range(10)), b"{}")
        except DiskFullError as error:
            print(error, error.exit_code, storage.exists("shards/000000.json"), storage.list("shards"), sep="|")
        storage.remove("a.png")
        with storage.claim(1):
            storage.commit(1, [("b.png", bytes(800_000))], b"{}")
        print(storage.list("shards"))
    """
    first, second = on_tmpfs(tmp_path / "disk", "size=1000k", script).splitlines()
    message, code, kept, listed = first.split("|")
    assert re.search(r"no space left in .*: shard 1 needs 3.0 MB, [56]\d\d kB are free; make room", message)
    assert (code, kept, listed) == ("75", "True", "['000000.json']")
    assert second == "['000000.json', '000001.json']"


def test_a_lock_that_does_not_fit_is_not_left_behind(tmp_path):
    script = """if True:
        import contextlib, os, sys
        from grounded_diffusion.engine.dataset.storage.open import open_storage
        from grounded_diffusion.errors import DiskFullError
        storage = open_storage(sys.argv[1] + "/run")
        with storage.claim(0), open(sys.argv[1] + "/ballast", "wb", buffering=0) as ballast:
            with contextlib.suppress(OSError):
                while ballast.write(bytes(4096)):
                    pass
            try:
                with storage.claim(1):
                    pass
            except DiskFullError as error:
                print(error.exit_code, storage.list("shards"))
    """
    assert on_tmpfs(tmp_path / "disk", "size=100k", script) == "75 ['000000.lock']\n"


def test_a_read_only_disk_is_one_line(tmp_path):
    script = """if True:
        import sys
        from grounded_diffusion.engine.dataset.storage.open import open_storage
        from grounded_diffusion.errors import UsageError
        storage = open_storage(sys.argv[1] + "/run")
        for attempt in (lambda: storage.put("run.json", b"{}"), lambda: storage.claim(0).__enter__(),
                        lambda: storage.commit(0, [("a.png", b"a")], b"{}")):
            try:
                attempt()
            except UsageError as error:
                print(error)
    """
    lines = on_tmpfs(tmp_path / "disk", "ro", script).splitlines()
    assert len(lines) == 3
    assert all(line == f"cannot write {tmp_path}/disk/run: Read-only file system" for line in lines)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^cannot write /sys/run: (Operation not permitted|Permission denied)$"):
        open_storage("/sys/run").put("run.json", b"{}")
    (tmp_path / "file").write_text("a file")
    for folder in ("file", "file/run"):
        with pytest.raises(UsageError, match=r"^cannot write .*/run\.json: .*/file(/\S+)? is a file, not a folder$"):
            open_storage(tmp_path / folder).put("run.json", b"{}")
    with pytest.raises(StorageError, match=r"cannot read .*: Is a directory"):
        open_storage(tmp_path).read("")


def test_a_lock_file_is_what_status_reads(storage):
    with storage.claim(12):
        lock = json.loads(Path(storage.root, "shards/000012.lock").read_text())
    assert set(lock) == {"host", "pid", "started"}


def test_clearing_leaves_nothing(storage):
    for shard in range(SHARDS):
        files = shard_files(shard).items()
        storage.commit(shard, files, encode_shard(shard, shard, [], files, [{"index": shard, "reason": "unsure"}]))
    storage.put("run.json", run_json("folder", {}))
    clear(storage)
    assert tree(storage.folder).keys() == {"run.json"}
    storage.remove("run.json")
    assert list(storage.folder.iterdir()) == []


def test_what_never_ends_is_not_read(storage):
    path = storage.folder / "shards" / "000000.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(UsageError, match="it is no regular file"):
        storage.read("shards/000000.json")
