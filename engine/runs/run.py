"""A run: what is asked for, what is there already, and the way from one to the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grounded_diffusion.engine.dataset.formats import Format
from grounded_diffusion.engine.dataset.ours import check_foreign_files, clear
from grounded_diffusion.engine.dataset.runfile import (
    RUN,
    SUMMARY,
    check_same,
    kind_of,
    read_about,
    read_summary,
    run_json,
    to_bytes,
)
from grounded_diffusion.engine.dataset.shards import (
    DamagedShard,
    finish_shards,
    finished_shards,
    is_finished,
    read_shard,
)
from grounded_diffusion.engine.dataset.storage.base import FINISH, SHARDS, Storage
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.monitor import Monitor
from grounded_diffusion.engine.runs.plan import Plan
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.engine.runs.worker import LOOK, Worker
from grounded_diffusion.errors import UsageError

START = "start"  # what to claim to write run.json


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run. Nothing of it is written before `start`.

    Attributes:
        config: as it was given, with the batch and the shard size that were chosen.
        settings: what run.json says.
        say: takes a line for the person who waits.
        begun: whether there is a run.json with these settings.
    """

    config: RunConfig
    pipe: GroundedPipeline
    plan: Plan
    storage: Storage
    format: Format
    settings: dict[str, Any]
    begun: bool
    say: Callable[[str], None]
    stop: Stop

    @property
    def shards(self) -> range:
        """The shards that are this process's."""
        share = self.config.share
        return share.shards(self.plan.shards) if share else range(self.plan.shards)

    def samples(self, shards: Iterable[int]) -> int:
        """How many samples shards have."""
        return sum(len(self.plan.indices(shard)) for shard in shards)

    def start(self) -> None:
        """Write run.json, unless it is there, once another run is removed that may be overwritten.

        Raises:
            UsageError: another run was faster, or is being made, or the output holds what is not ours.
        """
        if self.config.overwrite:
            self._check_alone()
        while not self.begun:
            with self.storage.claim(START) as mine:
                if mine:
                    return self._begin()
            self.stop.wait(LOOK)

    def _begin(self) -> None:
        """The same, by the one who may: from here on the output is this run's, also while the one before is removed."""
        before = read_about(self.storage)
        if before and not self.config.overwrite:
            check_same(self.storage.root, before.settings, self.settings)
        if before and before.settings == self.settings and not before.clearing:
            return
        if before:
            self._check_alone()
            check_foreign_files(self.storage)
            self.storage.put(RUN, run_json(self.format.name, self.settings, clearing=True))
            clear(self.storage)
        self.storage.put(RUN, run_json(self.format.name, self.settings))

    def _check_alone(self) -> None:
        """Raise UsageError where another worker is at work, from under which overwriting would pull the files."""
        for name, holder in self.storage.claims().items():
            if name != START:
                line = f"{self.storage.root} is being written by process {holder.get('pid')} on {holder.get('host')}"
                raise UsageError(f"{line}; stop it before overwrite", "overwrite")

    def missing(self) -> list[int]:
        """The shards of this process that have no record that can be used."""
        made = set(finished_shards(self.storage)) if self.begun else set()
        return [shard for shard in self.shards if shard not in made or self._record(shard) is None]

    def _record(self, shard: int) -> dict[str, Any] | None:
        self.stop.check()
        try:
            return read_shard(self.storage, shard, self.plan.indices(shard), self.format.row)
        except (DamagedShard, FileNotFoundError):
            return None

    def worker(self, monitor: Monitor) -> Worker:
        """What makes shards."""
        return Worker(
            self.pipe, self.plan, self.storage, self.format, options=self.config.options, filters=self.config.filters,
            attempts=self.config.attempts, monitor=monitor, say=self.say, stop=self.stop,
        )  # fmt: skip

    def finish(self, make: Callable[[list[int]], None]) -> dict[str, Any] | None:
        """Write what describes the whole data set, unless somebody has. None where shards are missing.

        Args:
            make: makes shards whose records turn out to be damaged.

        Returns:
            The summary: samples = accepted + rejected + quarantined, masks, and `reasons` of what is not accepted.
        """
        shards = range(self.plan.shards)
        while set(shards) <= set(finished_shards(self.storage)):
            with self.storage.claim(FINISH) as mine:
                damaged: list[int] = []
                if mine:
                    summary = read_summary(self.storage) if is_finished(self.storage, shards) else None
                    if not summary:
                        summary, damaged = self.count(shards)
                        if not damaged:
                            last = {SUMMARY: to_bytes(summary)}
                            if losses := finish_shards(self.storage, self.format, shards, self.settings, last):
                                self.say(losses)
                    if not damaged:
                        self._tidy()
                        return summary
            if damaged:
                make(damaged)
            else:
                self.stop.wait(LOOK)
        return None

    def count(self, shards: range) -> tuple[dict[str, Any], list[int]]:
        """The summary over the records of some shards, and the damaged ones."""
        counts, reasons, damaged = Counter(accepted=0, rejected=0, quarantined=0, masks=0), Counter(), []
        for shard in shards:
            record = self._record(shard)
            if record is None:
                damaged.append(shard)
                continue
            counts["accepted"] += record["accepted"]
            counts["masks"] += sum(len(row["objects"]) for row in record["rows"])
            for kind in ("rejected", "quarantined"):
                counts[kind] += len(record[kind])
                reasons.update(kind_of(entry["reason"], kind) for entry in record[kind])
        return {"samples": self.samples(shards), **counts, "reasons": dict(sorted(reasons.items()))}, damaged

    def _tidy(self) -> None:
        """Remove what killed workers left behind."""
        for name in self.storage.list(SHARDS):
            stem, _, suffix = name.partition(".")
            if suffix == "lock" and stem != FINISH:
                with self.storage.claim(int(stem) if stem.isdecimal() else stem):
                    pass
        self.storage.clean()
