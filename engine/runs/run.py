"""A run: what is asked for, what is there already, and the way from one to the other.

run.json        the settings that decide what is made; another command on the same output must have the same
summary.json    what came of it; written last of all, so a run that has it is complete
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.engine.dataset.formats import Format
from grounded_diffusion.engine.dataset.shards import DamagedShard, finish_shards, finished_shards, read_shard
from grounded_diffusion.engine.dataset.storage.base import FINISH, SHARDS, Storage
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.runs.filters import Filters
from grounded_diffusion.engine.runs.monitor import Monitor
from grounded_diffusion.engine.runs.plan import Plan
from grounded_diffusion.engine.runs.share import Worker as Share
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.runs.worker import LOOK, Worker
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError

RUN, SUMMARY = "run.json", "summary.json"
START = "start"  # what to claim to write run.json


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run. Nothing of it is written before `start`.

    Attributes:
        settings: what run.json says.
        share: which shards are this process's; None for all that nobody has.
        begun: whether there is a run.json with these settings.
    """

    pipe: GroundedPipeline
    plan: Plan
    storage: Storage
    format: Format
    options: Options
    filters: Filters
    attempts: int
    settings: dict[str, Any]
    share: Share | None
    begun: bool
    say: Callable[[str], None]
    stop: Stop

    @property
    def shards(self) -> range:
        """The shards that are this process's."""
        return self.share.shards(self.plan.shards) if self.share else range(self.plan.shards)

    def samples(self, shards: Iterable[int]) -> int:
        """How many samples shards have."""
        return sum(len(self.plan.indices(shard)) for shard in shards)

    def start(self, overwrite: bool = False) -> None:
        """Write run.json, unless it is there. Raises UsageError where another run was faster."""
        if self.begun:
            return
        if overwrite and self.storage.exists(RUN):
            if held := self.storage.claims():
                holder = next(iter(held.values()))
                raise UsageError(f"{self.storage.root} is being written by process {holder.get('pid')} on "
                                 f"{holder.get('host')}; stop it before --overwrite")  # fmt: skip
            self.storage.clear()
        while True:
            with self.storage.claim(START) as mine:
                if mine:
                    if before := read_settings(self.storage):
                        check_same(self.storage.root, before, self.settings)
                    else:
                        content = {"format": self.format.name, "settings": self.settings}
                        self.storage.put(RUN, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
                    return
            self.stop.wait(LOOK)

    def missing(self) -> list[int]:
        """The shards of this process that have no record that can be used."""
        made = set(finished_shards(self.storage)) if self.begun else set()
        return [shard for shard in self.shards if shard not in made or self._record(shard) is None]

    def _record(self, shard: int) -> dict[str, Any] | None:
        self.stop.check()
        try:
            return read_shard(self.storage, shard, self.plan.indices(shard))
        except (DamagedShard, FileNotFoundError):
            return None

    def worker(self, monitor: Monitor) -> Worker:
        """What makes shards."""
        return Worker(
            self.pipe, self.plan, self.storage, self.format, options=self.options, filters=self.filters,
            attempts=self.attempts, monitor=monitor, say=self.say, stop=self.stop,
        )  # fmt: skip

    def finish(self, make: Callable[[list[int]], None]) -> dict[str, Any] | None:
        """Write what describes the whole data set, unless somebody has. None where shards are missing.

        Args:
            make: makes shards whose records turn out to be damaged.

        Returns:
            The summary: samples = accepted + rejected + quarantined, masks, and `reasons` of what is not accepted.
        """
        while set(range(self.plan.shards)) <= set(finished_shards(self.storage)):
            with self.storage.claim(FINISH) as mine:
                damaged: list[int] = []
                if mine:
                    summary = read_json(self.storage, SUMMARY)
                    if not summary:
                        summary, damaged = self._count()
                        if not damaged:
                            losses = finish_shards(self.storage, self.format, range(self.plan.shards), self.settings)
                            if losses:
                                self.say(losses)
                            self.storage.put(
                                SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False).encode() + b"\n"
                            )
                    if not damaged:
                        self._tidy()
                        return summary
            if damaged:
                make(damaged)
            else:
                self.stop.wait(LOOK)
        return None

    def _count(self) -> tuple[dict[str, Any], list[int]]:
        """The summary over all records, and the damaged ones."""
        counts, reasons, damaged = Counter(accepted=0, rejected=0, quarantined=0, masks=0), Counter(), []
        for shard in range(self.plan.shards):
            record = self._record(shard)
            if record is None:
                damaged.append(shard)
                continue
            counts["accepted"] += record["accepted"]
            counts["masks"] += sum(len(row["objects"]) for row in record["rows"])
            for kind in ("rejected", "quarantined"):
                counts[kind] += len(record[kind])
                reasons.update(kind_of(entry["reason"], kind) for entry in record[kind])
        return {"samples": self.plan.samples, **counts, "reasons": dict(sorted(reasons.items()))}, damaged

    def _tidy(self) -> None:
        """Remove what killed workers left behind."""
        for name in self.storage.list(SHARDS):
            stem, _, suffix = name.partition(".")
            if suffix == "lock" and stem != FINISH:
                with self.storage.claim(int(stem) if stem.isdecimal() else stem):
                    pass
        self.storage.clean()


def kind_of(reason: str, kind: str) -> str:
    """A reason without what is particular to the sample, see filters.py."""
    return reason.partition(" of " if kind == "rejected" else ";")[0]


def read_settings(storage: Storage) -> dict[str, Any] | None:
    """The settings of the run that is there; None where there is none. Raises UsageError for a damaged run.json."""
    content = read_json(storage, RUN)
    if content is not None and not isinstance(content.get("settings"), dict):
        raise UsageError(f"{storage.root}/{RUN} is damaged; restore it, or start again with --overwrite")
    return content and content["settings"]


def read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    """A file of the output as JSON; None where there is none, {} where it is damaged."""
    try:
        content = json.loads(storage.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_same(root: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError that names every setting which differs."""
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        told = "; ".join(f"{key} was {show(before.get(key))}, now {show(now.get(key))}" for key in changed)
        raise UsageError(f"{root} has another run: {told}; give the same command to go on, or --overwrite")


def show(value: Any) -> str:
    """A setting as it appears in a message."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "not set" if value is None else shorten(str(value))
