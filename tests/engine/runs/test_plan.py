"""Plans: what a prompt file asks for, without holding it in memory."""

import json
import os
import tracemalloc

import pytest

from grounded_diffusion.engine.pipeline.job import list_jobs as all_jobs
from grounded_diffusion.engine.prompts.file import STRIDE, PromptFile, read_prompts
from grounded_diffusion.engine.prompts.prompt import as_prompts
from grounded_diffusion.engine.runs.plan import RETRY, Plan, default_shard_size, next_attempt
from grounded_diffusion.engine.sampling.noise import normal
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError

TEXTS = ["a [dog] of the command line", '{"prompt": "a [cat]", "count": 4}']


def mixed(number):
    """A line; counts, seeds, comments, empty lines and both forms occur."""
    if number % 7 == 3:
        return "   # a comment [dog]" if number % 2 else ""
    if number % 5 == 1:
        fields = {"prompt": f"the sea {number}", "objects": ["sea"], "count": 1 + number % 4}
        return json.dumps(fields | ({"seed": number} if number % 2 else {}))
    return f"a photograph of a [dog] number {number}"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(mixed, range(500))))
    return path


@pytest.mark.parametrize("shard_size", [1, 5, 64, 10_000])
@pytest.mark.parametrize("texts", [[], TEXTS])
def test_shards_hold_every_sample_once(file, texts, shard_size):
    """And are what reading all prompts at once gives, in any order in which they are asked for."""
    prompts = PromptFile(file, texts, images=3)
    plan = Plan(prompts, 11, 4, shard_size)
    expected = all_jobs(
        read_prompts(file) + (as_prompts(texts) if texts else []), Options(seed=11, images_per_prompt=3)
    )
    assert len(expected) == plan.samples
    assert prompts.prompts > 5 * STRIDE
    shards = range(plan.shards) if shard_size > 1 else range(0, plan.shards, 37)
    found = {shard: plan.jobs(shard) for shard in reversed(shards)}
    for shard in shards:
        indices = plan.indices(shard)
        assert found[shard] == expected[indices.start : indices.stop]
        assert [job for batch in plan.batches(found[shard]) for job in batch] == found[shard]
        assert {len(batch) for batch in plan.batches(found[shard])} <= {4, len(indices) % 4}
    assert sum(len(plan.indices(shard)) for shard in range(plan.shards)) == plan.samples


def test_prompts_of_the_command_line_alone():
    prompts = PromptFile(None, TEXTS, images=2)
    assert (prompts.prompts, prompts.samples) == (2, 6)
    assert [(count, prompt.objects) for count, prompt in prompts] == [(2, ("dog",)), (4, ("cat",))]
    assert [index for index, _, _ in prompts.between(1, 4)] == [1, 2, 3]


def test_the_digest_is_of_what_counts(file, tmp_path):
    digest = PromptFile(file).digest
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xef\xbb\xbf# a byte order mark\r\n" + file.read_bytes().replace(b"\n", b"  \r\n\r\n"))
    assert PromptFile(other).digest == digest
    assert PromptFile(other).samples == PromptFile(file).samples
    for changed in (file.read_text() + "\na [dog]", file.read_text().replace("number 17", "number 71")):
        other.write_text(changed)
        assert PromptFile(other).digest != digest
    assert PromptFile(file, TEXTS).digest != digest


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if not (pid := os.fork()):
        path.write_text("a [dog]\na [cat]\n")
        os._exit(0)
    prompts = PromptFile(path)
    os.waitpid(pid, 0)
    assert [prompt.objects for _, prompt in prompts] == [("dog",), ("cat",)]
    assert [prompt.objects for _, prompt, _ in prompts.between(1, 2)] == [("cat",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "has no prompts; write one a line"),
        (b"a [dog]\na cat\n", ":2: the prompt names no objects"),
        (b'# x\n{"prompt": "a [dog]", "count": 0}\n', ":2: count must be a whole number"),
        (b"a [dog]\na [\xff]\n", ":2: not UTF-8"),
        (b"a [dog]\n\0\n", ":2: contains a NUL byte"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^{path}{message}" if message.startswith(":") else message):
        list(PromptFile(path))


def test_a_file_that_changes_is_told(file):
    prompts = PromptFile(file)
    file.write_text(file.read_text() + "\na [cat]")
    with pytest.raises(UsageError, match="has changed during the run; restore it"):
        list(prompts.between(0, 1))
    file.unlink()
    with pytest.raises(UsageError, match="there is no prompt file"):
        list(prompts)


def test_a_long_file_takes_no_memory(tmp_path):
    """A hundred thousand prompts: their places take 16 bytes for every 64 of them."""
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"a photograph of a [dog] number {i}" for i in range(100_000)))
    tracemalloc.start()
    prompts = PromptFile(path)
    (last,) = prompts.between(99_999, 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last[1].text.endswith("number 99999")
    assert peak < 500_000


def test_default_shards():
    assert default_shard_size(200, 16) == 256
    assert default_shard_size(200, 1) == 16
    assert default_shard_size(10_000_000, 16) == 1008  # 9,921 shards of 63 batches
    assert -(-10_000_000 // default_shard_size(10_000_000, 1)) <= 10_000


def test_attempts_have_noise_of_their_own(file):
    plan = Plan(PromptFile(file), 11, 4, 64)
    job = plan.jobs(0)[3]
    again = next_attempt(job)
    assert (again.index, again.prompt, again.seed, again.draw) == (job.index, job.prompt, job.seed, job.draw + RETRY)
    first, second, third = (normal(j.seed, j.draw, (4, 8, 8)) for j in (job, again, next_attempt(again)))
    assert abs((first * second).mean()) < 0.3
    assert abs((second * third).mean()) < 0.3
    assert (second != third).all()


def test_shard_sizes_are_checked(file):
    with pytest.raises(UsageError, match="shard_size must be a whole number from 1"):
        Plan(PromptFile(file), 1, 1, 0)
