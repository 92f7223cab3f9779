"""gd-infer killed at any moment, by several workers at once, on full and read-only disks: always the same data set."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import null_backend as null

from grounded_diffusion.engine.dataset.formats.folder import FolderFormat
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.runs.plan import RETRY

NULL = Path(null.__file__)

SAMPLES, SHARD = 46, 6
SAMPLER = ["--steps", "2", "--sampler", "ddim", "--guidance-interval", "0", "1", "--attempts", "2"]
OPTIONS = [*SAMPLER, "--batch", "2", "--shard-size", str(SHARD)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A prompt file in which counts and seeds vary: SAMPLES samples."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = ["# counts and seeds", *(f"a photograph of a [dog] and a [cat] number {i}" for i in range(30))]
    lines += [json.dumps({"prompt": f"the sea {i}", "objects": ["sea"], "count": i, "seed": i}) for i in (1, 7, 8)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def command(tiny_bundle, prompts, tmp_path):
    """Arguments of the run that these tests make; `out` and more options follow."""
    return ["--model", tiny_bundle, "--prompts", prompts, *OPTIONS, "--out"]


def tree(folder):
    """Every file below a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(tiny_bundle, prompts, tmp_path_factory):
    """What one undisturbed worker makes, where every fifth sample fails and is tried twice."""
    out = tmp_path_factory.mktemp("expected") / "out"
    command = ["--model", tiny_bundle, "--prompts", prompts, *OPTIONS, "--out", out]
    assert null.main(command, null.FailingBackend) == 3
    return tree(out)


def start(arguments, backend=null.FailingBackend):
    """gd-infer in a fork; returns its pid."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(null.main(arguments, backend))
    finally:
        os._exit(1)


def wait_for_a_claim(out):
    """Until a worker holds a shard; its lock file alone does not say so."""
    while not any(name.isdecimal() for name in open_storage(out).claims()):
        time.sleep(0.001)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records_of(tree):
    """The shards' records."""
    return [json.loads(content) for name, content in tree.items() if name.startswith("shards/0")]


def check_tree(out, expected):
    """The same files with the same bytes, every id once."""
    got = tree(out)
    assert sorted(got) == sorted(expected)
    assert [name for name in got if got[name] != expected[name]] == []
    ids = [json.loads(line)["index"] for line in got["metadata.jsonl"].splitlines()]
    records = records_of(got)
    lost = [entry["index"] for record in records for entry in record["rejected"] + record["quarantined"]]
    assert sorted(ids + lost) == list(range(SAMPLES))
    assert ids == sorted(ids)
    assert not list(out.rglob(".partial"))
    assert not list(out.rglob("*.lock"))


def kill_at_random(command, folder, expected, kills, seed):
    """Run and kill until there were so many kills; a run that completes is checked, and another one begun."""
    rng, killed, runs = random.Random(seed), 0, 0
    while killed < kills:
        out, status = folder / f"run{runs}", None
        while status != 3:
            pid = start([*command, out])
            time.sleep(rng.uniform(0, 0.8))
            os.kill(pid, signal.SIGKILL)
            status = status_of(pid)
            assert status in (3, -signal.SIGKILL)
            killed += status != 3
        check_tree(out, expected)
        runs += 1
    return runs


def test_killed_at_random_moments(command, tmp_path, expected):
    assert kill_at_random(command, tmp_path, expected, kills=12, seed=1) >= 1


@pytest.mark.slow
def test_killed_at_100_random_moments(command, tmp_path, expected):
    assert kill_at_random(command, tmp_path, expected, kills=100, seed=2) >= 3


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("numbered", [True, False])
def test_several_workers_some_of_which_die(command, tmp_path, expected, workers, numbered):
    out, rng = tmp_path / "out", random.Random(workers)
    shares = [["--shard", f"{i}/{workers}"] if numbered else [] for i in range(workers)]
    for _ in range(2):
        pids = [start([*command, out, *share]) for share in shares]
        for pid in pids:
            time.sleep(rng.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            status_of(pid)
    statuses = [status_of(pid) for pid in [start([*command, out, *share]) for share in shares]]
    assert set(statuses) == {3} if not numbered else set(statuses) <= {0, 3}
    check_tree(out, expected)


def test_a_worker_waits_for_a_shard_that_another_holds(command, tmp_path, expected):
    """Without a number a worker returns when all is there, also if the other dies."""
    out = tmp_path / "out"
    first = start([*command, out])
    wait_for_a_claim(out)
    os.kill(first, signal.SIGSTOP)
    second = start([*command, out])
    time.sleep(1)
    assert os.waitpid(second, os.WNOHANG) == (0, 0)
    os.kill(first, signal.SIGKILL)
    status_of(first)
    assert status_of(second) == 3
    check_tree(out, expected)


def test_batches_at_once_change_nothing(command, tmp_path, expected):
    """Second attempts then come between the batches of later shards."""
    out = tmp_path / "out"
    assert null.main([*command, out, "--lanes", "3"], null.FailingBackend) == 3
    check_tree(out, expected)


def test_failures_are_tried_again_and_then_told(command, tmp_path, expected, capsys):
    summary = json.loads(expected["summary.json"])
    assert summary["samples"] == SAMPLES == summary["accepted"] + summary["rejected"] + summary["quarantined"]
    assert summary["rejected"] == 0 < summary["quarantined"] < 8
    assert summary["reasons"] == {"the latents at step 1 of 2 are not finite": summary["quarantined"]}
    records = records_of(expected)
    quarantined = [entry for record in records for entry in record["quarantined"]]
    assert {entry["attempts"] for entry in quarantined} == {2}
    rows = [row for record in records for row in record["rows"]]
    again = [row for row in rows if row["draw"] >= RETRY]
    assert again
    assert all(row["draw"] - RETRY < SAMPLES for row in again)
    assert null.main([*command, tmp_path / "out"], null.FailingBackend) == 3
    said = capsys.readouterr()
    lost = summary["quarantined"]
    assert f"{SAMPLES - lost} of {SAMPLES} images with" in said.out
    assert f"0 rejected, {lost} quarantined: the latents at step 1 of 2 are not finite {lost};" in said.err


class BlankBackend(null.NullBackend):
    """Some images have one colour."""

    def run(self, graph, inputs):
        outputs = super().run(graph, inputs)
        for image, latents in zip(outputs.get("image", ()), inputs.get("latents", ()), strict=False):
            if int(abs(latents[0, 0, 1]) * 1e4) % 3 == 0:
                image[:] = 0.5
        return outputs


def test_an_empty_image_is_a_failure(command, tmp_path):
    counts = []
    for attempts in (1, 5):
        out = tmp_path / str(attempts)
        assert null.main([*command, out, "--attempts", attempts], BlankBackend) in (0, 3)
        summary = json.loads((out / "summary.json").read_text())
        counts.append(summary["quarantined"])
        assert summary["reasons"] == ({"the image has one colour only": counts[-1]} if counts[-1] else {})
    assert 5 < counts[0] < SAMPLES - 5
    assert counts[1] < counts[0] / 2


def test_a_sample_that_cannot_be_encoded_is_given_up(command, tmp_path, monkeypatch):
    def encode(self, record):
        if record.index in (3, 7):
            raise OSError("encoder error -2")
        return encode_well(self, record)

    encode_well = FolderFormat.encode
    monkeypatch.setattr(FolderFormat, "encode", encode)
    assert null.main([*command, tmp_path / "out"]) == 3
    records = records_of(tree(tmp_path / "out"))
    lost = [entry for record in records for entry in record["quarantined"]]
    assert sorted(entry["index"] for entry in lost) == [3, 7]
    assert {entry["reason"] for entry in lost} == {"cannot be encoded: encoder error -2"}


def test_rejected_samples_are_made_again(command, tmp_path, capsys):
    """More attempts accept more, and what is accepted at once stays."""
    counts, rows = [], []
    for attempts in (1, 3):
        out = tmp_path / str(attempts)
        options = ["--min-area", "0.015", "--min-distance", "20", "--attempts", attempts]
        assert null.main([*command, out, *options]) == 3
        summary = json.loads((out / "summary.json").read_text())
        assert summary["accepted"] + summary["rejected"] == SAMPLES
        assert summary["quarantined"] == 0
        assert summary["rejected"] == sum(summary["reasons"].values())
        counts.append(summary["accepted"])
        rows.append({r["index"]: r for r in map(json.loads, (out / "metadata.jsonl").read_text().splitlines())})
    assert 0 < counts[0] < counts[1]
    assert all(thing["area"] >= 0.015 * 64 * 64 for row in rows[1].values() for thing in row["objects"])
    once = [index for index, row in rows[1].items() if row["draw"] < RETRY]
    assert once
    assert len(once) < len(rows[1])
    assert all(rows[0][index] == rows[1][index] for index in once)


@pytest.mark.parametrize("damage", ["", "{", '{"shard": 2}', None])
def test_a_damaged_record_is_made_again(command, tmp_path, expected, capsys, damage):
    out = tmp_path / "out"
    assert null.main([*command, out], null.FailingBackend) == 3
    record = out / "shards" / "000002.json"
    record.write_text(record.read_text()[:-200] if damage is None else damage)
    capsys.readouterr()
    assert null.main([*command, out], null.FailingBackend) == 3
    said = capsys.readouterr().err.splitlines()
    assert sum("000002.json is damaged; the shard is made again" in line for line in said) == 1
    check_tree(out, expected)


def test_a_share_whose_last_worker_finds_another_ones_damage(command, tmp_path, expected):
    """Whoever finishes makes what is damaged, whoever's it is."""
    out = tmp_path / "out"
    assert null.main([*command, out, "--shard", "0/2"], null.FailingBackend) in (0, 3)
    assert not (out / "summary.json").exists()
    assert not (out / "metadata.jsonl").exists()
    (out / "shards" / "000002.json").write_text("")
    assert null.main([*command, out, "--shard", "1/2"], null.FailingBackend) == 3
    check_tree(out, expected)


def test_a_lost_summary_is_written_again(command, tmp_path, expected):
    out = tmp_path / "out"
    assert null.main([*command, out], null.FailingBackend) == 3
    for name in ("summary.json", "metadata.jsonl"):
        (out / name).unlink()
    assert null.main([*command, out], null.FailingBackend) == 3
    check_tree(out, expected)


def test_a_changed_run_is_refused_by_name(command, tmp_path, prompts, capsys):
    out = tmp_path / "out"
    assert null.main([*command, out]) == 0
    before = tree(out)
    more = tmp_path / "more.jsonl"
    more.write_text(prompts.read_text() + "\na [dog]")
    for options, message in (
        (["--seed", "8"], "seed was 7, now 8;"),
        (["--batch", "3"], "batch was 2, now 3;"),
        (["--shard-size", "7", "--steps", "3"], "shard_size was 6, now 7; steps was 2, now 3;"),
        (["--format", "null"], "format was folder, now null"),
        (["--require-masks"], "require_masks was False, now True"),
        (["--prompts", more], "prompts was "),
        (["--guidance-scale", "2"], "guidance_scale was 7.5, now 2.0"),
    ):
        capsys.readouterr()
        assert null.main([*command, out, *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said
        assert "or --overwrite" in said
        assert tree(out) == before
    assert null.main([*command, out, "--seed", "8", "--overwrite"]) == 0
    assert tree(out)["run.json"] != before["run.json"]


def test_comments_and_line_ends_change_nothing(command, tmp_path, prompts):
    out, other = tmp_path / "out", tmp_path / "windows.jsonl"
    assert null.main([*command, out]) == 0
    other.write_bytes(b"\xef\xbb\xbf" + prompts.read_bytes().replace(b"\n", b"\r\n\r\n# more\r\n"))
    assert null.main([*command, out, "--prompts", other]) == 0


def test_batch_and_shard_size_are_those_the_run_was_begun_with(command, tmp_path):
    """Another worker need not repeat them, nor have the defaults of the first one's machine."""
    out = tmp_path / "out"
    assert null.main([*command, out, "--shard", "0/2"]) == 0
    assert null.main([*command[:4], *SAMPLER, "--out", out]) == 0
    assert json.loads((out / "run.json").read_text())["settings"]["shard_size"] == SHARD


def on_small_disk(folder, options, *commands):
    """Run Python commands in turn where a tmpfs is mounted on a folder."""
    folder.mkdir(exist_ok=True)
    inner = f'mount -t tmpfs -o {options} none "$0" && exec "$1" -c "$2" "$0"'
    script = "\n".join(commands)
    run = ["unshare", "--map-root-user", "--mount", "sh", "-c", inner, folder, sys.executable, script]
    return subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)


def test_a_full_disk_ends_in_a_line_and_the_run_goes_on(command, tmp_path, expected):
    script = f"""if True:
        import sys, shutil, pathlib
        sys.path.insert(0, {str(NULL.parent)!r})
        import null_backend
        disk = pathlib.Path(sys.argv[1])
        (disk / "ballast").write_bytes(bytes(1_600_000))
        arguments = {[str(argument) for argument in command]!r} + [str(disk / "out")]
        print(null_backend.main(arguments, null_backend.FailingBackend))
        print(sorted(path.name for path in (disk / "out" / "shards").iterdir()))
        (disk / "ballast").unlink()
        print(null_backend.main(arguments, null_backend.FailingBackend))
        shutil.copytree(disk / "out", {str(tmp_path / "copy")!r})
    """
    done = on_small_disk(tmp_path / "disk", "size=2M", script)
    first, shards, *_, last = done.stdout.splitlines()
    assert (first, last) == ("75", "3"), done
    assert "lock" not in shards
    assert 1 <= shards.count("json") < SAMPLES / SHARD
    (line,) = [line for line in done.stderr.splitlines() if "no space left" in line]
    assert re.search(r"shard \d needs \d+ kB, \d+ kB are free; make room, then give the same command again$", line)
    check_tree(tmp_path / "copy", expected)


def test_a_read_only_folder_is_one_line(command, tmp_path):
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(NULL.parent)!r})
        import null_backend
        sys.exit(null_backend.main({[str(argument) for argument in command]!r} + [sys.argv[1] + "/out"]) != 2)
    """
    done = on_small_disk(tmp_path / "disk", "ro", script)
    assert done.stderr == f"gd-infer: cannot write {tmp_path}/disk/out: Read-only file system\n"


def test_overwrite_waits_for_nobody(command, tmp_path, capsys):
    """It is refused where another worker is at work, and for workers that would remove each other's shards."""
    out = tmp_path / "out"
    pid = start([*command, out])
    wait_for_a_claim(out)
    os.kill(pid, signal.SIGSTOP)
    assert null.main([*command, out, "--overwrite"]) == 2
    assert f"is being written by process {pid} on" in capsys.readouterr().err
    assert null.main([*command, out, "--overwrite", "--shard", "0/2"]) == 2
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    assert null.main([*command, out, "--overwrite"]) == 0
