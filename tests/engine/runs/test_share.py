"""Which worker a process is, from what schedulers set."""

from itertools import chain

import pytest

from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.runs.share import Share, parse_shard, shard_of_environment
from grounded_diffusion.errors import UsageError


def array(task, low, high, step=1, count=None, **more):
    """What Slurm sets in a job of an array."""
    count = (high - low) // step + 1 if count is None else count
    names = dict(ID=task, MIN=low, MAX=high, STEP=step, COUNT=count)
    return {"SLURM_JOB_ID": "100"} | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()} | more


SRUN = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="3", SLURM_NTASKS="4")
BATCH = dict(SLURM_NTASKS="4", SLURM_PROCID="0")  # in the script itself
TORCHRUN = dict(TORCHELASTIC_RUN_ID="x", RANK="5", WORLD_SIZE="16", LOCAL_RANK="1")


@pytest.mark.parametrize(
    ("environment", "index", "count", "source"),
    [
        (array(0, 0, 7), 0, 8, "Slurm array"),
        (array(7, 0, 7, **BATCH), 7, 8, "Slurm array"),
        (array(9, 1, 15, 4), 2, 4, "Slurm array"),
        (array(5, 5, 5), 0, 1, "Slurm array"),
        (array(2, 0, 2, **SRUN), 11, 12, "Slurm array and srun"),
        ({"SLURM_JOB_ID": "1"} | SRUN, 3, 4, "srun"),
        ({"JOB_COMPLETION_INDEX": "2", "GD_COMPLETIONS": "6"}, 2, 6, "Kubernetes Indexed Job"),
        (TORCHRUN, 5, 16, "torchrun"),
        (array(0, 0, 7) | SRUN | TORCHRUN, 5, 16, "torchrun"),
    ],
)
def test_schedulers(environment, index, count, source):
    environment = {"PATH": "/bin"} | environment
    assert shard_of_environment(environment) == parse_shard("auto", environment) == Share(index, count, source)


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "1"} | BATCH, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_no_scheduler(environment):
    assert shard_of_environment(environment) is None
    with pytest.raises(UsageError, match=r"shard auto finds no scheduler.*give shard I/N"):
        parse_shard("auto", environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "2"}, "set GD_COMPLETIONS to the Job's completions"),
        ({"JOB_COMPLETION_INDEX": "2", "GD_COMPLETIONS": "2"}, r"worker 2 of 2 \(Kubernetes Indexed Job\) does not"),
        ({"JOB_COMPLETION_INDEX": "two", "GD_COMPLETIONS": "2"}, "JOB_COMPLETION_INDEX should be a whole number"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, "WORLD_SIZE should be a whole number here, but is None"),
        (array(5, 3, 5, count=2), "not evenly spaced"),
    ],
)
def test_half_answers(environment, message):
    with pytest.raises(UsageError, match=message):
        shard_of_environment(environment)


def test_by_hand():
    assert parse_shard("2/8", {}) == Share(2, 8, "shard")
    for text in ("8/8", "0/0"):
        with pytest.raises(UsageError, match=r"\(shard\) does not exist; workers count from 0"):
            parse_shard(text, {})
    for text in ("", "1", "1/2/3", "-1/2", "a/b"):
        with pytest.raises(UsageError, match="shard takes I/N"):
            parse_shard(text, {})


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_every_shard_has_one_worker(count):
    workers = [list(Share(index, count).shards(12)) for index in range(count)]
    assert sorted(chain.from_iterable(workers)) == list(range(12))
    assert max(map(len, workers)) - min(map(len, workers)) <= 1


def test_workers_of_an_indexed_job_make_one_data_set(tiny_bundle, tmp_path, monkeypatch, capsys):
    given = f"--model={tiny_bundle} --images-per-prompt=10 --steps=2 --batch=2 --shard-size=2 --threads=1".split()
    options = [*given, "--prompt", "a photograph of a [dog]", "--out"]
    assert main([*options, str(tmp_path / "alone")]) == 0
    monkeypatch.setenv("GD_COMPLETIONS", "3")
    shared = [*options, str(tmp_path / "shared"), "--shard", "auto"]
    for index, made in (("2", [2]), ("0", [0, 2, 3]), ("0", [0, 2, 3]), ("1", [0, 1, 2, 3, 4])):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
        assert main(shared) == 0
        there = sorted(path.stem for path in (tmp_path / "shared/shards").glob("0*.json"))
        assert there == [f"{shard:06d}" for shard in made]
    trees = [
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "alone", tmp_path / "shared")
    ]
    assert trees[0] == trees[1]
    assert "worker 0 of 3: all of its 2 shards are made; 3 of the run's 5 are" in capsys.readouterr().out
