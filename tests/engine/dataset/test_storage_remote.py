"""Output to S3, against a real server on this machine."""

import hashlib
import json
import subprocess
import sys
import threading
import time

import pytest

from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.dataset.ours import clear
from grounded_diffusion.engine.dataset.runfile import run_json
from grounded_diffusion.engine.dataset.shards import encode_shard, finished_shards
from grounded_diffusion.engine.dataset.storage import remote as storage_remote
from grounded_diffusion.engine.dataset.storage.base import FINISH, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.dataset.storage.remote import FsspecStorage
from grounded_diffusion.errors import StorageError, UsageError

BUCKET = "data-sets"


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server with a bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1",
                          aws_access_key_id="key", aws_secret_access_key="secret")  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    yield address
    server.stop()


@pytest.fixture
def s3(server, monkeypatch, request):
    """A new prefix of the bucket."""
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"),
                        ("AWS_ENDPOINT_URL", server), ("AWS_DEFAULT_REGION", "us-east-1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{BUCKET}/{request.node.name}")


def objects(storage):
    """All keys below a storage, with their content."""
    return {key.removeprefix(f"{storage.prefix}/"): storage.fs.cat_file(key) for key in storage.fs.find(storage.prefix)}


def test_files(s3):
    assert isinstance(s3, FsspecStorage)
    assert s3.list("images") == []
    assert not s3.exists("run.json")
    s3.put("run.json", b"{}")
    s3.put("images/b.png", b"b")
    s3.put("images/a.png", b"old")
    s3.put("images/a.png", b"a")
    s3.put("images/deeper/c.png", b"c")
    assert s3.list("images") == ["a.png", "b.png"]
    assert s3.list("") == ["run.json"]
    assert s3.read("images/a.png") == b"a"
    assert s3.exists("images/a.png")
    assert not s3.exists("images")
    s3.remove("images/a.png")
    s3.remove("images/a.png")
    assert s3.list("images") == ["b.png"]
    with pytest.raises(FileNotFoundError):
        s3.read("images/a.png")


def test_a_stream_of_several_blocks_is_whole(s3, monkeypatch):
    monkeypatch.setattr(storage_remote, "BLOCK", 5 << 20)  # the least that S3 takes
    chunk, digest = bytes(range(256)) * 4096, hashlib.sha256()
    with s3.create("metadata.jsonl") as stream:
        for _ in range(12):
            stream.write(chunk)
            digest.update(chunk)
            assert not s3.exists("metadata.jsonl")
    assert hashlib.sha256(s3.read("metadata.jsonl")).digest() == digest.digest()


@pytest.mark.parametrize("size", [10, 6 << 20])
def test_a_stream_that_fails_leaves_nothing(s3, monkeypatch, size):
    monkeypatch.setattr(storage_remote, "BLOCK", 5 << 20)
    with pytest.raises(ValueError, match="a matter of the caller"), s3.create("metadata.jsonl") as stream:
        stream.write(bytes(size))
        raise ValueError("a matter of the caller")
    assert objects(s3) == {}


def test_a_shard_is_there_with_its_record(s3, monkeypatch):
    monkeypatch.setattr(storage_remote, "GROUP", 2000)  # several groups
    files = {f"images/{i}.png": bytes([i]) * 500 for i in range(11)}
    s3.commit(3, iter(files.items()), b"{}")
    assert objects(s3) == files | {"shards/000003.json": b"{}"}


def test_without_all_files_there_is_no_record(s3):
    def files():
        yield "images/0.png", b"0"
        raise ValueError("cannot be packed")

    with pytest.raises(ValueError, match="cannot be packed"):
        s3.commit(3, files(), b"{}")
    assert not s3.exists(record_path(3))


def test_one_worker_holds_a_shard(s3):
    other = open_storage(s3.root)
    with s3.claim(3) as mine, other.claim(3) as theirs, other.claim(4) as another:
        assert (mine, theirs, another) == (True, False, True)
        held = s3.claims()
        assert set(held) == {"000003", "000004"}
        assert held["000003"]["host"]
        assert held["000003"]["started"]
    assert objects(s3) == {}
    with other.claim(3) as theirs, other.claim(FINISH) as last:
        assert theirs
        assert last


def test_of_many_workers_at_once_one_gets_the_shard(s3):
    start, stop, got = threading.Barrier(6), threading.Barrier(6), []

    def work(storage):
        start.wait(10)
        with storage.claim(0) as mine:
            got.append(mine)
            stop.wait(10)

    threads = [threading.Thread(target=work, args=(open_storage(s3.root),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(got) == [False] * 5 + [True]


def test_a_silent_worker_loses_its_shard_and_a_living_one_keeps_it(s3, monkeypatch):
    lock = {"host": "elsewhere", "pid": 1, "started": "2026-01-01T00:00:00+00:00", "renewed": time.time() - 5}
    s3.put("shards/000003.lock", json.dumps(lock).encode())
    with s3.claim(3) as mine:
        assert not mine
        assert s3.claims() == {"000003": lock}
    monkeypatch.setattr(storage_remote, "LEASE", 2.0)
    with s3.claim(3) as mine:
        assert mine
    monkeypatch.setattr(storage_remote, "RENEW", 0.2)
    with s3.claim(3) as mine:
        time.sleep(2.5)
        with open_storage(s3.root).claim(3) as theirs:
            assert mine
            assert not theirs


def test_a_restarted_task_takes_its_own_shard_back(s3):
    with s3.claim(3):
        lock = json.loads(s3.read("shards/000003.lock"))
    s3.put("shards/000003.lock", json.dumps(lock).encode())  # same host and pid, as in a container that starts again
    with s3.claim(3) as mine:
        assert mine
    s3.put("shards/000003.lock", b"damaged")
    with s3.claim(3) as mine:
        assert mine


def test_errors_are_one_line(s3, monkeypatch):
    with pytest.raises(UsageError, match=r"s3://nowhere/run/run\.json: the bucket does not exist; create it"):
        open_storage("s3://nowhere/run").put("run.json", b"{}")
    with pytest.raises(UsageError, match="nosuch://bucket"):
        open_storage("nosuch://bucket/run")
    with pytest.raises(StorageError, match="outside"):
        s3.put("../other/run.json", b"{}")
    with pytest.raises(UsageError, match=r"gs://bucket/run: .*pip install 'grounded-diffusion\[remote\]'"):
        monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
        open_storage("gs://bucket/run")


def test_a_url_of_a_file_is_a_folder(tmp_path):
    storage = open_storage(f"file://{tmp_path}/run")
    storage.put("run.json", b"{}")
    assert (tmp_path / "run" / "run.json").read_bytes() == b"{}"


def test_clearing_leaves_nothing_but_what_is_beside(s3):
    beside = open_storage(f"{s3.root}-beside")
    for storage in (s3, beside):
        files = [("images/0.png", b"0")]
        storage.commit(0, files, encode_shard(0, 0, [], files, [{"index": 0, "reason": "unsure"}]))
        storage.put("run.json", run_json("folder", {}))
    clear(s3)
    assert objects(s3).keys() == {"run.json"}
    assert len(objects(beside)) == 3


def test_a_run_whose_first_worker_was_killed(s3, tiny_bundle, tmp_path):
    given = f"--model={tiny_bundle} --images-per-prompt=24 --steps=4 --batch=2 --shard-size=4 --threads=1".split()
    options = [*given, "--prompt", "a photograph of a [dog]", "--out"]
    assert main([*options, str(tmp_path)]) == 0
    expected = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    process = subprocess.Popen([sys.executable, "-m", "grounded_diffusion.engine.cli.infer", *options, s3.root])
    deadline = time.monotonic() + 60
    while not s3.exists(record_path(1)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait(10)
    assert len(finished_shards(s3)) < 6
    assert main([*options, s3.root]) == 0
    assert objects(s3) == expected
