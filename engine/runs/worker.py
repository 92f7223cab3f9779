"""The worker: claims shards, has the model make their samples, and puts each shard in place once it is whole.

    claim ─ batches ─ model ─ filters ─ encode (threads) ─ commit (a thread): files, then the record
              └──── again, with other noise ────┘

What is finished of a shard in hand is kept on the disk as well, see keep.py.
The next shard's batches follow the last one's without a gap: encoding and committing happen beside the model.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import BoundedSemaphore
from typing import Any

from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.engine.dataset.formats import Encoded, Format
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.shards import DamagedShard, encode_shard, read_shard
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.pipeline.job import Failed, Job
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.runs.filters import Checker, Filters
from grounded_diffusion.engine.runs.keep import Keeper, Outcome, kept_outcome
from grounded_diffusion.engine.runs.monitor import Monitor
from grounded_diffusion.engine.runs.plan import Plan, next_attempt
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.sample import Sample
from grounded_diffusion.errors import GroundedDiffusionError

LOOK = 1.0  # seconds from one look at a shard that another worker holds to the next
COMMITS = 2  # shards that may wait to be put in place before the model has to
ENCODED = 4  # samples to a thread that may wait to be encoded before the model has to


@dataclass(eq=False, slots=True)
class ShardInProgress:
    """A shard that this worker has claimed and is making.

    Attributes:
        claim: released when closed.
        waiting: batches of this attempt that the model has not made yet.
        attempt: from 1; all samples of an attempt are made before the next begins.
        again: what the next attempt is to make.
        encoded: by index, of the accepted samples.
        judged: batches of all attempts that have been judged.
        lost: ("rejected" or "quarantined") -> entries of the shard's record.
    """

    shard: int
    claim: contextlib.ExitStack
    checker: Checker
    waiting: int = 0
    attempt: int = 1
    judged: int = 0
    again: list[Job] = field(default_factory=list)
    encoded: dict[int, Future[Encoded]] = field(default_factory=dict)
    lost: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"rejected": [], "quarantined": []})


Batch = tuple[ShardInProgress, tuple[Job, ...]]


class Worker:
    """Makes shards of a run. Several may work on one run, on any machines.

    Args:
        attempts: noises to try for a sample that fails or that the filters refuse.
        say: takes a line for the person who waits.
        stop: looked at after every batch; once set, what is finished of the shards in progress is kept.
        encoders: threads that encode; None takes half of the cores.
    """

    def __init__(
        self,
        pipe: GroundedPipeline,
        plan: Plan,
        storage: Storage,
        format: Format,
        *,
        options: Options,
        filters: Filters,
        attempts: int,
        monitor: Monitor,
        say: Callable[[str], None],
        stop: Stop,
        encoders: int | None = None,
    ):
        self.pipe, self.plan, self.storage, self.format = pipe, plan, storage, format
        self.options, self.filters, self.attempts = options, filters, attempts
        self.monitor, self.say, self.stop = monitor, say, stop
        self.encoders = encoders or max(2, usable_cores() // 2)

    def run(self, shards: Iterable[int]) -> None:
        """Make every shard that has no record. When this returns all have one, whoever made it.

        Args:
            shards: taken one by one, as the model gets to them.

        Raises:
            Interrupted: the run was asked to stop.
            StorageError, UsageError: the output cannot be written.
            BackendError: the model cannot run.
        """
        while shards := self._make(shards):
            self.stop.wait(LOOK)

    def _make(self, shards: Iterable[int]) -> list[int]:
        """Make the shards that can be claimed; returns those that others hold."""
        self._held, self._in_progress = [], set()
        self._fresh, self._retries, self._submitted = self._batches(shards), deque(), deque()
        self._commits: deque[Future[None]] = deque()
        self._room = BoundedSemaphore(ENCODED * self.encoders)
        with (
            contextlib.ExitStack() as claims,
            Keeper(self.storage, self.stop) as self._keeper,
            ThreadPoolExecutor(1, "commit") as self._committer,
            ThreadPoolExecutor(self.encoders, "encode") as self._encoder,
        ):
            claims.callback(self._drop)
            while self._generate():
                pass
            while self._commits:
                self._commits.popleft().result()
        return self._held

    def _generate(self) -> bool:
        """Make all batches that are there to make; False when there were none."""
        any_made, started = False, time.monotonic()
        with contextlib.closing(self.pipe.batches(self._feed(), self.options)) as made:
            for results in made:
                any_made, now = True, time.monotonic()
                work, jobs = self._submitted.popleft()
                self.monitor.batch(len(jobs), now - started)
                started = now
                self._take(work, jobs, results)
                while self._commits and (self._commits[0].done() or len(self._commits) > COMMITS):
                    self._commits.popleft().result()  # raises what went wrong: a full disk ends the run now
                self.monitor.queue("commit", len(self._commits))
                self.monitor.report()
                self.stop.check()
        return any_made

    def _feed(self) -> Iterator[tuple[Job, ...]]:
        """Batches for the pipeline: second attempts first, so that few shards are in progress at a time."""
        while batch := self._retries.popleft() if self._retries else next(self._fresh, None):
            self._submitted.append(batch)
            yield batch[1]
            self.stop.check()

    def _batches(self, shards: Iterable[int]) -> Iterator[Batch]:
        """Batches of the shards, each claimed when it is its turn."""
        for shard in shards:
            with contextlib.ExitStack() as claim:
                if not claim.enter_context(self.storage.claim(shard)):
                    self._held.append(shard)
                elif self._is_made(shard):
                    self.monitor.elsewhere(len(self.plan.indices(shard)))
                else:
                    work = ShardInProgress(shard, claim.pop_all(), self.filters.checker())
                    self._in_progress.add(work)
                    yield from self._without_kept(work, self._round(work, self.plan.jobs(shard)))

    def _is_made(self, shard: int) -> bool:
        """Whether a shard has a record. One that is damaged is told, and made again."""
        try:
            read_shard(self.storage, shard, self.plan.indices(shard))
        except FileNotFoundError:
            return False
        except DamagedShard as error:
            self.say(f"{str(error).partition(';')[0]}; the shard is made again")
            return False
        return True

    def _round(self, work: ShardInProgress, jobs: list[Job]) -> list[Batch]:
        """The batches of an attempt."""
        batches = [(work, batch) for batch in self.plan.batches(jobs)]
        work.waiting, work.again = len(batches), []
        return batches

    def _without_kept(self, work: ShardInProgress, batches: list[Batch]) -> list[Batch]:
        """What is left of a shard's batches once those that were kept are taken over."""
        before = work.judged
        for entries in self._keeper.load(work.shard):
            jobs = batches[0][1]
            if [(entry["index"], entry["draw"]) for entry in entries] != [(job.index, job.draw) for job in jobs]:
                break
            outcomes = [kept_outcome(job, entry) for job, entry in zip(jobs, entries, strict=True)]
            self.monitor.kept(sum(outcome.sample is not None for outcome in outcomes))
            batches = batches[1:] + self._settle(work, outcomes)
            if not batches:
                break
        if work.judged > before:
            self.say(f"shard {work.shard}: {len(work.encoded)} images were made before and kept")
        return batches

    def _take(self, work: ShardInProgress, jobs: tuple[Job, ...], results: list[Sample | Failed]) -> None:
        """Judge the samples of a batch that came back, and go on with its shard if it was the last."""
        outcomes = [self._judge(work, job, result) for job, result in zip(jobs, results, strict=True)]
        self.monitor.queue("encode", sum(not future.done() for future in work.encoded.values()))
        self._keeper.add(work.shard, work.judged, outcomes)
        self._retries.extend(self._settle(work, outcomes))

    def _settle(self, work: ShardInProgress, outcomes: list[Outcome]) -> list[Batch]:
        """Go on with a shard by what came of a batch; returns the batches of its next attempt, where there is one."""
        for outcome in outcomes:
            job = outcome.job
            if outcome.sample:
                work.encoded[job.index] = outcome.sample
                work.checker.remember(job.index, outcome.hash)
            elif work.attempt < self.attempts:
                self.monitor.failed(outcome.reason, index=job.index, attempt=work.attempt)
                work.again.append(next_attempt(job))
            else:
                self._give_up(work, outcome.kind, job.index, outcome.reason)
        work.waiting -= 1
        work.judged += 1
        if work.waiting:
            return []
        if work.again:
            work.attempt += 1
            return self._round(work, work.again)
        self._in_progress.discard(work)
        self._commits.append(self._committer.submit(self._commit, work))
        return []

    def _judge(self, work: ShardInProgress, job: Job, result: Sample | Failed) -> Outcome:
        """Have a sample encoded, or say why not."""
        if isinstance(result, Failed):
            return Outcome(job, kind="quarantined", reason=result.reason.removeprefix(f"sample {job.index}: "))
        if result.image.min() == result.image.max():
            return Outcome(job, kind="quarantined", reason="the image has one colour only")
        if refused := work.checker.check(result):
            return Outcome(job, kind="rejected", reason=refused)
        self._room.acquire()
        return Outcome(job, self._encoder.submit(self._encode, result), work.checker.hashes.get(job.index))

    def _give_up(self, work: ShardInProgress, kind: str, index: int, reason: str) -> None:
        """Leave a sample out of the data set, with its reason."""
        work.lost[kind].append({"index": index, "reason": reason, "attempts": work.attempt})
        tell = self.monitor.rejected if kind == "rejected" else self.monitor.quarantined
        tell(reason, index=index)

    def _encode(self, sample: Sample) -> Encoded:
        try:
            encoded = self.format.encode(Record.from_sample(sample, self.plan.split(sample.index)))
        finally:
            self._room.release()
        self.monitor.accepted()
        return encoded

    def _encoded(self, work: ShardInProgress) -> list[Encoded]:
        """The accepted samples, in order. One that cannot be encoded is given up."""
        samples = []
        for index in sorted(work.encoded):
            try:
                samples.append(work.encoded[index].result())
            except (GroundedDiffusionError, MemoryError):
                raise
            except Exception as error:  # Pillow and pyarrow raise many kinds
                self._give_up(work, "quarantined", index, f"cannot be encoded: {error}")
        return samples

    def _commit(self, work: ShardInProgress) -> None:
        """Put a shard in place."""
        with work.claim:
            samples = self._encoded(work)
            lost = {kind: sorted(entries, key=lambda entry: entry["index"]) for kind, entries in work.lost.items()}
            files = list(self.format.pack(work.shard, self.plan.shards, samples))
            rows = [sample.row for sample in samples]
            record = encode_shard(work.shard, self.plan.indices(work.shard).start, rows, files, **lost)
            self.storage.commit(work.shard, files, record)
            self._keeper.forget(work.shard)
        self.monitor.shard(work.shard)

    def _drop(self) -> None:
        """Give back what is claimed and not made."""
        for work in self._in_progress:
            with contextlib.suppress(GroundedDiffusionError):  # the claims of a disk that fails, say
                work.claim.close()
