"""What a run shows of itself: progress, a structured log, and metrics for Prometheus."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric

from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.metrics import (
    Histogram,
    check_log,
    counter,
    gauge,
    gpu_busy,
    open_log,
    parse_address,
    registry_of,
    serve_metrics,
    unwritable,
)
from grounded_diffusion.engine.runs.progress import Pace, Progress, ProgressBar, Rate
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import check_target, replace_file

METRICS_BEGIN = b"# HELP grounded_diffusion_"  # every metrics file of ours
REFRESH = 10.0  # seconds between two metrics files
REASONS = 32  # different reasons that get a label of their own, so that a collector never meets thousands


def open_monitor(
    config: RunConfig, say: Callable[[str], None] | None, on_progress: Callable[[Progress], None] | None = None
) -> Monitor:
    """The monitor that a configuration asks for. Raises UsageError for a file or port that cannot be used."""
    address = parse_address(config.metrics_port) if config.metrics_port is not None else None
    log, metrics_file = (Path(file) if file else None for file in (config.log, config.metrics_file))
    return Monitor(say, on_progress, log=log, metrics_file=metrics_file, address=address)


def check_places(config: RunConfig) -> None:
    """Raise UsageError where a configuration cannot be watched as it asks, or has no Ray. Nothing is opened."""
    if config.metrics_file:
        check_target(Path(config.metrics_file), "metrics_file", (".prom",), METRICS_BEGIN)
    if config.log:
        check_log(Path(config.log))
    if config.ray is not None and importlib.util.find_spec("ray") is None:
        raise UsageError("`ray` needs Ray; pip install 'grounded-diffusion[ray]'", "ray")


class Monitor:
    """Told by the worker what happens; any thread may call. `close` in any case.

    Args:
        say: takes a line for the person who waits; None shows no progress.
        on_progress: called by `report`, and no bar is shown.
        log: file to append JSON lines to: `time` (UTC), `event`, and the event's fields.
        metrics_file: replaced every REFRESH seconds, and at the end.
        address: host and port to serve /metrics at; port 0 takes a free one, see `address`.

    A log or metrics file that fails during the run is given up with a line: it is not what the run is for.

    Raises:
        UsageError: the log or metrics file cannot be written, or the port is taken.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        log: str | Path | None = None,
        metrics_file: str | Path | None = None,
        address: tuple[str, int] | None = None,
    ):
        self.say, self.on_progress = say, on_progress
        self.metrics_file = Path(metrics_file) if metrics_file else None
        self.total = self.done = 0
        self.accepted_images = self.batches_images = self.shards = 0
        self.rejections, self.quarantines, self.failures = Counter(), Counter(), Counter()
        self.queues: dict[str, int] = {}
        self.batch_seconds, self.rate, self.pace = Histogram(), Rate(), Pace()
        self.gpus: dict[str, float] = {}
        self.registry = registry_of(self)
        self._bar: ProgressBar | None = None
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._log = open_log(Path(log)) if log else None
        self._server = self._ticker = None
        if self.metrics_file:
            check_target(self.metrics_file, "metrics_file", (".prom",), METRICS_BEGIN)
            try:
                replace_file(self.metrics_file, generate_latest(self.registry))
            except OSError as error:
                raise unwritable("metrics_file", self.metrics_file, error) from None
        if address:
            self._server = serve_metrics(address, self.registry)
        if metrics_file or address:
            self._ticker = threading.Thread(target=self._tick, name="monitor", daemon=True)
            self._ticker.start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the metrics are served."""
        if self._server is None:
            return None
        host, port = self._server.server_address[:2]
        return str(host), port

    def begin(self, total: int, done: int, lanes: int = 1) -> None:
        """The run has `total` samples, `done` of them finished by an earlier run; `lanes` batches are made at once."""
        with self._lock:
            self.total, self.done, self.rate, self.pace = total, done, Rate(), Pace(lanes)
            if self.say and not self.on_progress:
                self._bar = ProgressBar(total, done, self.say)
            self.event("begin", total=total, done=done)

    def shard(self, index: int) -> None:
        """A shard is finished: its record is in place."""
        with self._lock:
            self.shards += 1
            self.event("shard", shard=index, done=self.done)

    def elsewhere(self, samples: int) -> None:
        """Another worker has finished this many samples of the run."""
        with self._lock:
            self.done += samples
            self.event("elsewhere", samples=samples)
            self._show()

    def kept(self, samples: int) -> None:
        """Samples that an earlier run has made and kept."""
        with self._lock:
            self.done += samples
            self.event("kept", samples=samples)
            self._show()

    def batch(self, images: int, seconds: float) -> None:
        """The model has made a batch, `seconds` after the one before."""
        with self._lock:
            self.batches_images += images
            self.pace.batch(images)
            self.batch_seconds.observe(seconds)
            self.event("batch", images=images, seconds=round(seconds, 4), queues=dict(self.queues))

    def accepted(self, n: int = 1) -> None:
        """Samples that are part of the data set."""
        with self._lock:
            self.accepted_images += n
            self._count(n)

    def failed(self, reason: str, **fields: Any) -> None:
        """An attempt gave no sample: it failed, or a filter refused it. It may be tried again."""
        with self._lock:
            self._add(self.failures, reason)
            self.event("failed", reason=reason, **fields)

    def rejected(self, reason: str, **fields: Any) -> None:
        """A sample that the filters have refused for good."""
        with self._lock:
            self._add(self.rejections, reason)
            self.event("rejected", reason=reason, **fields)
            self._count(1)

    def quarantined(self, reason: str, **fields: Any) -> None:
        """A sample that could not be made."""
        with self._lock:
            self._add(self.quarantines, reason)
            self.event("quarantined", reason=reason, **fields)
            self._count(1)

    def queue(self, name: str, depth: int) -> None:
        """How many samples wait in a queue."""
        self.queues[name] = depth

    def event(self, event: str, **fields: Any) -> None:
        """A line of the log."""
        with self._lock:
            if self._log is None:
                return
            time_ = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            try:
                self._log.write(
                    json.dumps({"time": time_, "event": event, **fields}, ensure_ascii=False, default=str) + "\n"
                )
            except OSError as error:
                self._log = None
                self._tell(f"the log ends here: {error.strerror or error}")

    def progress(self) -> Progress:
        """How far the run is."""
        with self._lock:
            settled, made = self.rate.images, max(self.pace.images - self.pace.last, self.rate.images)
            pace = self.pace.value * (settled / made if settled else 1)  # what fails is made again
            left = (self.total - self.done) / pace if pace else None
            return Progress(self.total, self.done, self.accepted_images, self.rejections.total(),
                            self.quarantines.total(), pace or self.rate.value,
                            left if self.done < self.total else 0.0)  # fmt: skip

    def report(self) -> None:
        """Tell `on_progress`. For the thread that makes the run: what the callback raises ends it."""
        if self.on_progress:
            self.on_progress(self.progress())

    def summary(self) -> str:
        """What came of this run: "12 accepted, 3 rejected (no mask 2, area 1), 1 quarantined (NaN 1)"."""
        with self._lock:
            parts = [f"{self.accepted_images} accepted"]
            for what, reasons in (("rejected", self.rejections), ("quarantined", self.quarantines)):
                if reasons:
                    each = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common())
                    parts.append(f"{reasons.total()} {what} ({each})")
            return ", ".join(parts)

    def close(self, status: str = "end") -> None:
        """The run is over; `status` is told in the log. A second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._bar:
            self._bar.close()
        if self._ticker:
            self._ticker.join()
            self._save()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        rate = round(self.rate.value, 4)
        self.event("end", status=status, done=self.done, total=self.total, accepted=self.accepted_images,
                   rejected=dict(self.rejections), quarantined=dict(self.quarantines), rate=rate)  # fmt: skip
        if self._log:
            self._log.close()
            self._log = None

    def collect(self) -> Iterator[Metric]:
        """The metrics, as prometheus_client asks for them. What is unknown is left out."""
        with self._lock:
            families = (
                gauge("images_planned", "Samples of the whole run.", self.total),
                gauge("images_done", "Samples settled, those of earlier runs included.", self.done),
                counter("images_accepted", "Samples of this process that were accepted.", self.accepted_images),
                counter("images_rejected", "Samples that the filters refused for good.", self.rejections, "reason"),
                counter("images_quarantined", "Samples that could not be made.", self.quarantines, "reason"),
                counter("attempt_failures", "Attempts that gave no sample.", self.failures, "reason"),
                counter("shards_finished", "Shards that this process has finished.", self.shards),
                counter("images_generated", "Images that the model made, all attempts counted.", self.batches_images),
                gauge("images_per_second", "Samples settled a second, over the last minutes.", self.rate.value),
                gauge("queue_depth", "Samples that wait in a queue.", self.queues.copy(), "queue"),
                self.batch_seconds.family("batch_seconds", "Seconds from one batch to the next."),
                gauge("gpu_busy_ratio", "Share of time in which a GPU of this machine was busy.", self.gpus, "gpu"),
            )
        return (family for family in families if family.samples)

    def render(self) -> str:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def _add(self, counter: Counter, reason: str) -> None:
        label = re.split(r"\s*[:;(\d'\"]| of ", reason.strip(), maxsplit=1)[0].strip() or "unknown"
        counter[label if label in counter or len(counter) < REASONS else "other"] += 1

    def _count(self, n: int) -> None:
        self.done += n
        self.rate.add(n)
        self._show()

    def _show(self) -> None:
        if self._bar:
            self._bar.show(self.progress())

    def _tick(self) -> None:
        while True:
            self.gpus = gpu_busy()
            self._save()
            if self._closing.wait(REFRESH):
                return

    def _save(self) -> None:
        if self.metrics_file:
            try:
                replace_file(self.metrics_file, generate_latest(self.registry))
            except (OSError, UsageError) as error:
                self._tell(f"{self.metrics_file} is not kept any more: {getattr(error, 'strerror', None) or error}")
                self.metrics_file = None

    def _tell(self, line: str) -> None:
        if self.say:
            self.say(line)
