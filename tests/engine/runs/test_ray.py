"""A run on a real Ray cluster of this machine, whose workers die, against one of a single process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from grounded_diffusion.engine import Options, RunConfig, make_dataset
from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.runs.ray import RayMonitor, ShardQueue, ray_cluster
from grounded_diffusion.errors import UsageError

PROMPT = "a photograph of a [dog] and a [cat]"
SETTINGS = dict(images_per_prompt=60, steps=6, batch=2, shard_size=4, threads=1)


@pytest.fixture(scope="module")
def options(tiny_bundle):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    return ["--model", str(tiny_bundle), "--prompt", PROMPT, *given]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    """The tree that a single process makes."""
    out = tmp_path_factory.mktemp("ray") / "alone"
    assert main([*options, "--out", str(out)]) == 0
    return tree(out)


def tree(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(options, folder):
    """gd-infer into `folder`/out with two workers, in a process of its own."""
    arguments = [*options, "--out", "out", "--ray", "--workers", "2"]
    command = [sys.executable, "-m", "grounded_diffusion.engine.cli.infer", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, condition):
    """Wait until a running command has come so far."""
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=30)[0]
        time.sleep(0.01)
    return found


def workers_at_work(storage):
    """Processes that hold shards, once each of two has one, and some are made."""
    pids = {lock["pid"] for lock in storage.claims().values()}
    return pids if len(pids) == 2 and len(storage.list("shards")) > 4 else None


def test_a_killed_workers_shards_are_made_by_another(options, alone, tmp_path):
    process = start(options, tmp_path)
    storage = open_storage(tmp_path / "out")
    victim = min(wait_for(process, lambda: workers_at_work(storage)))
    os.kill(victim, signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "gd-infer: a worker died; shard " in said
    assert "goes to another" in said
    assert tree(tmp_path / "out") == alone


def test_a_stopped_run_goes_on_without_ray(options, alone, tmp_path):
    process = start(options, tmp_path)
    storage = open_storage(tmp_path / "out")
    pids = wait_for(process, lambda: workers_at_work(storage))
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and time.monotonic() - asked < 10, said
    assert "interrupted by SIGTERM; the same command goes on" in said
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):  # noqa: PTH110
        assert time.monotonic() < deadline, "a worker outlives its run"
        time.sleep(0.1)
    assert main([*options, "--out", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out") == alone


def test_from_python(tiny_bundle, alone, tmp_path):
    """Workers are sent the configuration; progress comes back to the one who called."""
    told = []
    drawn = Options(**{name: SETTINGS[name] for name in ("images_per_prompt", "steps", "batch")})
    config = RunConfig(
        prompts=PROMPT, out=tmp_path / "out", model=tiny_bundle, options=drawn, shard_size=SETTINGS["shard_size"],
        threads=1, ray="", workers=2,
    )  # fmt: skip
    result = make_dataset(config, on_progress=told.append)
    assert result.finished
    assert result.accepted == told[-1].done == 60
    assert tree(tmp_path / "out") == alone


def test_a_cluster_that_is_not_there(options, tmp_path, capsys, monkeypatch):
    assert main([*options, "--out", str(tmp_path / "out"), "--ray", "127.0.0.1:1"]) == 2
    assert "no Ray cluster at 127.0.0.1:1: " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'grounded-diffusion\[ray\]'"), ray_cluster(""):
        pass


def test_the_queue_gives_every_shard_to_one_living_worker():
    queue = ShardQueue([3, 4, 5, 6])
    assert [queue.take(0), queue.take(1), queue.take(0)] == [3, 4, 5]
    queue.tell(0, "shard", (3,), {})
    assert queue.look() == ([("shard", (3,), {})], 3, 2)
    assert queue.look() == ([], 3, 2)
    assert queue.lost(0) == [5]
    assert queue.lost(7) == []
    assert [queue.take(1), queue.take(2), queue.take(1)] == [5, 6, None]
    queue.done(1)
    assert queue.look()[1] == 1
    queue.done(2)
    assert queue.look()[1] == 0


def test_samples_count_once_their_shard_is_made(options, alone, tmp_path):
    storage, told = open_storage(tmp_path), []
    storage.put("shards/000002.json", alone["shards/000002.json"])
    relay = RayMonitor(lambda *event: told.append(event), storage)
    relay.accepted()
    relay.batch(2, 0.5)
    relay.shard(2)
    assert told == [("batch", (2, 0.5), {}), ("accepted", (4,), {}), ("shard", (2,), {})]
