"""The worker: claims shards, has the model make their samples, and puts each shard in place once it is whole.

    claim ─ batches ─ model ─ filters ─ encode (threads) ─ commit (a thread): files, then the record
              └──── again, with other noise ────┘

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
        lost: ("rejected" or "quarantined") -> entries of the shard's record.
    """

    shard: int
    claim: contextlib.ExitStack
    checker: Checker
    waiting: int = 0
    attempt: int = 1
    again: list[Job] = field(default_factory=list)
    encoded: dict[int, Future[Encoded]] = field(default_factory=dict)
    lost: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"rejected": [], "quarantined": []})


Batch = tuple[ShardInProgress, tuple[Job, ...]]


class Worker:
    """Makes shards of a run. Several may work on one run, on any machines.

    Args:
        attempts: noises to try for a sample that fails or that the filters refuse.
        say: takes a line for the person who waits.
        stop: looked at after every batch; once set, the shards in progress are dropped.
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
                    yield from self._round(work, self.plan.jobs(shard))

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

    def _take(self, work: ShardInProgress, jobs: tuple[Job, ...], results: list[Sample | Failed]) -> None:
        """Judge the samples of a batch that came back, and go on with its shard if it was the last."""
        for job, result in zip(jobs, results, strict=True):
            self._judge(work, job, result)
        self.monitor.queue("encode", sum(not future.done() for future in work.encoded.values()))
        work.waiting -= 1
        if work.waiting:
            return
        if work.again:
            work.attempt += 1
            self._retries.extend(self._round(work, work.again))
            return
        self._in_progress.discard(work)
        self._commits.append(self._committer.submit(self._commit, work))

    def _judge(self, work: ShardInProgress, job: Job, result: Sample | Failed) -> None:
        """Have a sample encoded, or its slot tried again, or give it up."""
        if isinstance(result, Failed):
            kind, reason = "quarantined", result.reason.removeprefix(f"sample {job.index}: ")
        elif result.image.min() == result.image.max():
            kind, reason = "quarantined", "the image has one colour only"
        elif refused := work.checker.check(result):
            kind, reason = "rejected", refused
        else:
            self._room.acquire()
            work.encoded[job.index] = self._encoder.submit(self._encode, result)
            return
        if work.attempt < self.attempts:
            self.monitor.failed(reason, index=job.index, attempt=work.attempt)
            work.again.append(next_attempt(job))
        else:
            self._give_up(work, kind, job.index, reason)

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
        self.monitor.shard(work.shard)

    def _drop(self) -> None:
        """Give back what is claimed and not made."""
        for work in self._in_progress:
            with contextlib.suppress(GroundedDiffusionError):  # the claims of a disk that fails, say
                work.claim.close()
