"""Finished samples of the shards in hand, kept on disk: what a worker has made outlives its being stopped or killed.

    .partial/kept/000012-000003     batches of shard 12, from its fourth
        SHA-256 of run.json and of what follows; a JSON line that tells of every job; the samples' files end to end

A batch is kept with what came of each of its jobs. The worker that makes the shard again takes the kept batches over,
in their order, as if the model had just made them, so that nothing in the shard's bytes shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

from grounded_diffusion.engine.dataset.formats import Encoded
from grounded_diffusion.engine.dataset.runfile import RUN
from grounded_diffusion.engine.dataset.storage.base import PARTIAL, Storage
from grounded_diffusion.engine.pipeline.job import Job
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import GroundedDiffusionError

KEPT = f"{PARTIAL}/kept"
EVERY = 20.0  # seconds of work that SIGKILL may cost; a run that is asked to stop loses only the batches under way


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a job: a sample, encoded or about to be, or why there is none.

    Attributes:
        sample: None where it is refused.
        hash: of an accepted sample, where the filters compare samples.
        kind, reason: "rejected" or "quarantined", of a refused one.
    """

    job: Job
    sample: Future[Encoded] | None = None
    hash: int | None = None
    kind: str = ""
    reason: str = ""


@dataclass(eq=False, slots=True)
class Waiting:
    """Batches of a shard that are not on the disk yet; `first` counts those before."""

    first: int
    batches: list[list[Outcome]]


class Keeper:
    """Keeps what a worker has made; a context manager, with a thread that writes now and then and when asked to stop.

    It is not what the run is for: where it cannot write, nothing more is kept.
    """

    def __init__(self, storage: Storage, stop: Stop):
        self.storage, self.stop = storage, stop
        self._run = b""
        self._waiting: dict[int, Waiting] = {}
        self._lock, self._closing, self._broken = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="keep", daemon=True)

    def __enter__(self) -> Self:
        with contextlib.suppress(FileNotFoundError):
            self._run = self.storage.read(RUN)
        self._unwatch = self.stop.tell(self._closing.set)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unwatch()
        self._closing.set()
        self._thread.join()
        self._try_to_write()

    def add(self, shard: int, number: int, outcomes: list[Outcome]) -> None:
        """Batch `number` of a shard, from 0 in the order in which they are judged."""
        with self._lock:
            self._waiting.setdefault(shard, Waiting(number, [])).batches.append(outcomes)

    def load(self, shard: int) -> Iterator[list[dict[str, Any]]]:
        """The kept batches of a shard, in order, each with a dictionary a job: index, draw, and kind and reason or hash
        and sample. What is damaged ends it."""
        count = 0
        for name in self._names(shard):
            batches = decode(self._run, self._read(name))
            if name != file_name(shard, count) or not batches:
                return
            count += len(batches)
            yield from batches

    def forget(self, shard: int) -> None:
        """A shard is in place; what was kept of it goes."""
        with self._lock, contextlib.suppress(GroundedDiffusionError):
            self._waiting.pop(shard, None)
            for name in self._names(shard):
                self.storage.remove(f"{KEPT}/{name}")

    def _names(self, shard: int) -> list[str]:
        return [name for name in self.storage.list(KEPT) if name.startswith(f"{shard:06d}-")]

    def _read(self, name: str) -> bytes:
        with contextlib.suppress(FileNotFoundError, GroundedDiffusionError):
            return self.storage.read(f"{KEPT}/{name}")
        return b""

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._closing.wait(EVERY)
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            if not self._broken:
                self._write()
        except (GroundedDiffusionError, OSError):
            self._broken = True

    def _write(self) -> None:
        """Write what has been encoded, of every shard."""
        with self._lock:
            for shard, waiting in self._waiting.items():
                ready = 0
                while ready < len(waiting.batches) and is_encoded(waiting.batches[ready]):
                    ready += 1
                if ready:
                    name = file_name(shard, waiting.first)
                    self.storage.put(f"{KEPT}/{name}", encode(self._run, waiting.batches[:ready]))
                    waiting.first += ready
                    del waiting.batches[:ready]


def file_name(shard: int, first: int) -> str:
    """Of a shard's batches from the one of number `first`."""
    return f"{shard:06d}-{first:06d}"


def is_encoded(outcomes: Sequence[Outcome]) -> bool:
    """Whether all samples of a batch can be written."""
    futures = [outcome.sample for outcome in outcomes if outcome.sample]
    return all(future.done() and not future.cancelled() and not future.exception() for future in futures)


def encode(run: bytes, batches: Sequence[Sequence[Outcome]]) -> bytes:
    """The content of a file; `run` is the run.json that it belongs to."""
    head, contents = [], []
    for outcomes in batches:
        entries = []
        for outcome in outcomes:
            entry: dict[str, Any] = {"index": outcome.job.index, "draw": outcome.job.draw}
            if outcome.sample is None:
                entry |= {"kind": outcome.kind, "reason": outcome.reason}
            else:
                sample = outcome.sample.result()
                files = [[name, len(content)] for name, content in sample.files.items()]
                entry |= {"hash": outcome.hash, "row": sample.row, "files": files}
                contents += sample.files.values()
            entries.append(entry)
        head.append(entries)
    body = b"".join([json.dumps(head, ensure_ascii=False).encode(), b"\n", *contents])
    return hashlib.sha256(run + body).hexdigest().encode() + b"\n" + body


def decode(run: bytes, content: bytes) -> list[list[dict[str, Any]]]:
    """The batches of a file; none where it is damaged, or of another run."""
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(run + body).hexdigest().encode() != digest:
        return []
    line, _, rest = body.partition(b"\n")
    place, batches = 0, json.loads(line)
    for entry in (entry for entries in batches for entry in entries):
        if "row" in entry:
            files = {}
            for name, size in entry.pop("files"):
                files[name] = rest[place : place + size]
                place += size
            entry["sample"] = Encoded(files, entry.pop("row"))
    return batches


def kept_outcome(job: Job, entry: dict[str, Any]) -> Outcome:
    """What a file says of a job."""
    if "sample" not in entry:
        return Outcome(job, kind=entry["kind"], reason=entry["reason"])
    encoded: Future[Encoded] = Future()
    encoded.set_result(entry["sample"])
    return Outcome(job, encoded, entry["hash"])
