"""gd-dataset status: runs that go on, have died, are finished, or have come to harm."""

import json
import os
import subprocess
import sys

import pytest
from msgspec.structs import asdict

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.shards import encode_shard
from grounded_diffusion.engine.dataset.status import PIECE, describe_holder, read_head, read_status
from grounded_diffusion.engine.dataset.storage.base import FINISH, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage

HOLD = """
import sys, time
from grounded_diffusion.engine.dataset.storage.open import open_storage
with open_storage(sys.argv[1]).claim(int(sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    """Three of five shards of a run of 18 samples, written ten seconds apart."""
    storage = open_storage(tmp_path / "out")
    settings = {"samples": 18, "shard_size": 4, "format": "folder"}
    storage.put("run.json", json.dumps({"format": "folder", "settings": settings}).encode())
    for number in range(3):
        commit(storage, number)
    return storage


def commit(storage, number, size=4):
    first = 4 * number
    rejected = [{"index": first, "reason": "no mask of dog", "attempts": 4}]
    failed = [{"index": first + 1, "reason": "NaN; at step 3", "attempts": 4}] if number == 1 else []
    rows = [{"index": k, "prompt": "x" * PIECE} for k in range(first + 1 + len(failed), first + size)]
    storage.commit(number, [], encode_shard(number, first, rows, [], rejected, failed))
    os.utime(storage.folder / record_path(number), (1e9 + 10 * number, 1e9 + 10 * number))


def hold(storage, shard):
    """A process of its own that holds a shard."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.root, str(shard)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"True\n"
    return process


def test_running(run, capsys):
    process = hold(run, 3)
    try:
        status = read_status(run.root)
        assert main(["status", run.root]) == 0
    finally:
        process.kill()
        process.wait()
    assert status["state"] == "running"
    assert status["shards"] == {"total": 5, "finished": 3, "in_hand": 1, "missing": 1, "damaged": []}
    assert status["samples"] == {"total": 18, "accepted": 8, "rejected": 3, "quarantined": 1, "missing": 6}
    assert status["reasons"] == {"rejected": {"no mask": 3}, "quarantined": {"NaN": 1}}
    assert status["rate"] == pytest.approx(0.4)
    assert status["left"] == pytest.approx(15)
    (holder,) = status["holders"]
    assert (holder["shard"], holder["pid"], holder["alive"]) == (3, process.pid, True)
    text = capsys.readouterr().out
    assert "running" in text
    assert "3 of 5 finished, 1 in hand, 1 missing" in text
    assert "0.40 images/s, 0:15 left" in text
    assert f"shard 3 by process {process.pid}" in text


def test_killed(run, capsys):
    process = hold(run, 3)
    process.kill()
    process.wait()
    status = read_status(run.root)
    assert status["state"] == "stopped"
    assert status["left"] is None
    assert status["shards"]["in_hand"] == 0
    assert status["shards"]["missing"] == 2
    assert [(holder["pid"], holder["alive"]) for holder in status["holders"]] == [(process.pid, False)]
    assert main(["status", run.root]) == 0
    text = capsys.readouterr().out
    assert "which is gone" in text
    assert "give the same gd-infer command again" in text


def test_finished(run, capsys):
    commit(run, 3)
    commit(run, 4, 2)
    assert read_status(run.root)["state"] == "unfinished"
    with run.claim(FINISH) as mine:
        assert mine
        status = read_status(run.root)
        assert status["state"] == "running"
        assert status["shards"]["in_hand"] == 0
        assert "the lists by process" in describe_holder(status["holders"][0])
    run.put("summary.json", b"{}")
    assert main(["status", run.root, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["state"] == "finished"
    assert status["samples"]["missing"] == 0
    assert not status["holders"]
    assert status["next"].startswith("gd-dataset verify")


def test_damaged_record(run, capsys):
    (run.folder / record_path(1)).write_bytes(b'{"shard": 1, "rejec')
    status = read_status(run.root)
    assert status["shards"]["damaged"] == [1]
    assert status["shards"]["missing"] == 3
    assert status["samples"]["missing"] == 10
    assert "damaged" in status["next"]
    assert main(["status", run.root]) == 0
    assert "1 records: shard 1" in capsys.readouterr().out


def test_the_head_of_a_record_does_not_need_its_rows(run):
    path = run.folder / record_path(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:PIECE])
    assert read_head(run, record_path(2)).samples == 4
    awkward = {"index": 0, "reason": 'x", "files": {', "attempts": 1}
    run.put(record_path(2), encode_shard(2, 8, [], [], [awkward] * 3000))  # longer than a piece
    assert [asdict(lost) for lost in read_head(run, record_path(2)).rejected] == [awkward] * 3000


def test_just_begun(run):
    for number in range(3):
        run.remove(record_path(number))
    status = read_status(run.root)
    assert status["rate"] is None
    assert status["samples"]["missing"] == 18
    assert status["state"] == "stopped"


def test_a_merged_data_set_is_finished(blobs, tmp_path):
    other = blobs.write(tmp_path / "other", range(20, 22))
    assert main(["merge", str(blobs.path), str(other), "--out", str(tmp_path / "both")]) == 0
    status = read_status(tmp_path / "both")
    assert status["state"] == "finished"
    assert status["samples"]["accepted"] == 11


def test_not_a_run(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err


def test_remote(run):
    """An output behind a URL: the same, without the rate."""
    import fsspec

    files = fsspec.filesystem("memory")
    for path in ("run.json", *(f"shards/{name}" for name in run.list("shards"))):
        files.pipe(f"/status/{path}", run.read(path))
    status, here = read_status("memory://status"), read_status(run.root)
    assert status["samples"] == here["samples"]
    assert status["reasons"] == here["reasons"]
    assert status["rate"] is None
