"""What a run shows of itself: progress, a structured log, and metrics for Prometheus."""

from __future__ import annotations

import argparse
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from grounded_diffusion.engine.runs.metrics import PREFIX, Histogram, family, gpu_busy, parse_address, serve_metrics
from grounded_diffusion.engine.runs.progress import Progress, Rate
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import check_target, local_path, replace_file

METRICS_BEGIN = f"# HELP {PREFIX}".encode()  # every metrics file of ours
LOG_BEGIN = b'{"time": "'  # and every log
REFRESH = 10.0  # seconds between two metrics files
REASONS = 32  # different reasons that get a label of their own, so that a collector never meets thousands


def add_monitor_options(parser: argparse.ArgumentParser) -> None:
    """The options that `open_monitor` reads."""
    group = parser.add_argument_group("seen from outside")
    group.add_argument("--log", type=local_path, metavar="FILE", help="append a structured log, one JSON object a line")
    group.add_argument(
        "--metrics-file", type=local_path, metavar="FILE",
        help="keep a Prometheus text file there, as node_exporter's textfile collector reads it (*.prom)",
    )  # fmt: skip
    group.add_argument(
        "--metrics-port", metavar="[HOST:]PORT", help="serve /metrics for Prometheus there (host: 127.0.0.1)"
    )


def open_monitor(args: argparse.Namespace, say: Callable[[str], None]) -> Monitor:
    """The monitor that the options ask for. Raises UsageError for a file or port that cannot be used."""
    address = parse_address(args.metrics_port) if args.metrics_port is not None else None
    return Monitor(say, log=args.log, metrics_file=args.metrics_file, address=address)


class Monitor:
    """Told by the worker what happens; any thread may call. `close` in any case.

    Args:
        say: takes a line for the person who waits; None shows no progress.
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
        *,
        log: Path | None = None,
        metrics_file: Path | None = None,
        address: tuple[str, int] | None = None,
    ):
        self.say, self.metrics_file = say, metrics_file
        self.total = self.done = 0
        self.accepted_images = self.batches_images = self.shards = 0
        self.rejections, self.quarantines, self.failures = Counter(), Counter(), Counter()
        self.queues: dict[str, int] = {}
        self.batch_seconds, self.rate = Histogram(), Rate()
        self.gpus: list[tuple[str, float]] = []
        self._progress: Progress | None = None
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._log = open_log(log) if log else None
        self._server = self._ticker = None
        if metrics_file:
            check_target(metrics_file, "--metrics-file", (".prom",), METRICS_BEGIN)
            try:
                replace_file(metrics_file, self.render().encode())
            except OSError as error:
                raise unwritable("--metrics-file", metrics_file, error) from None
        if address:
            self._server = serve_metrics(address, self.render)
        if metrics_file or address:
            self._ticker = threading.Thread(target=self._tick, name="monitor", daemon=True)
            self._ticker.start()

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the metrics are served."""
        return self._server.server_address[:2] if self._server else None

    def begin(self, total: int, done: int) -> None:
        """The run has `total` samples, `done` of which an earlier run has finished."""
        with self._lock:
            self.total, self.done, self.rate = total, done, Rate()
            if self.say:
                self._progress = Progress(total, done, self.say)
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

    def batch(self, images: int, seconds: float) -> None:
        """The model has made a batch, `seconds` after the one before."""
        with self._lock:
            self.batches_images += images
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
        if self._progress:
            self._progress.close()
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

    def render(self) -> str:
        """The metrics in Prometheus' text format."""
        with self._lock:
            by_reason = lambda counter: [("", {"reason": reason}, n) for reason, n in sorted(counter.items())]
            one = lambda value: [("", {}, value)]
            return "".join(
                family(*row)
                for row in (
                    ("images_planned", "gauge", "Samples of the whole run.", one(self.total)),
                    ("images_done", "gauge", "Samples settled, those of earlier runs included.", one(self.done)),
                    ("images_accepted_total", "counter", "Samples of this process that were accepted.",
                     one(self.accepted_images)),
                    ("images_rejected_total", "counter", "Samples that the filters refused for good.",
                     by_reason(self.rejections)),
                    ("images_quarantined_total", "counter", "Samples that could not be made.",
                     by_reason(self.quarantines)),
                    ("attempt_failures_total", "counter", "Attempts that gave no sample.", by_reason(self.failures)),
                    ("shards_finished_total", "counter", "Shards that this process has finished.", one(self.shards)),
                    ("images_generated_total", "counter", "Images that the model made, all attempts counted.",
                     one(self.batches_images)),
                    ("images_per_second", "gauge", "Samples settled a second, over the last minutes.",
                     one(self.rate.value)),
                    ("queue_depth", "gauge", "Samples that wait in a queue.",
                     [("", {"queue": name}, depth) for name, depth in sorted(self.queues.copy().items())]),
                    ("batch_seconds", "histogram", "Seconds from one batch to the next.",
                     self.batch_seconds.samples()),
                    ("gpu_busy_ratio", "gauge", "Share of time in which a GPU of this machine was busy.",
                     [("", {"gpu": index}, share) for index, share in self.gpus]),
                )
            )  # fmt: skip

    def _add(self, counter: Counter, reason: str) -> None:
        label = re.split(r"\s*[:;(\d'\"]| of ", reason.strip(), maxsplit=1)[0].strip() or "unknown"
        counter[label if label in counter or len(counter) < REASONS else "other"] += 1

    def _count(self, n: int) -> None:
        self.done += n
        self.rate.add(n)
        self._show()

    def _show(self) -> None:
        if self._progress:
            counts = ((self.rejections.total(), "rejected"), (self.quarantines.total(), "quarantined"))
            self._progress.show(self.done, self.rate.value, ", ".join(f"{n} {what}" for n, what in counts if n))

    def _tick(self) -> None:
        while True:
            self.gpus = gpu_busy()
            self._save()
            if self._closing.wait(REFRESH):
                return

    def _save(self) -> None:
        if self.metrics_file:
            try:
                replace_file(self.metrics_file, self.render().encode())
            except (OSError, UsageError) as error:
                self._tell(f"{self.metrics_file} is not kept any more: {getattr(error, 'strerror', None) or error}")
                self.metrics_file = None

    def _tell(self, line: str) -> None:
        if self.say:
            self.say(line)


def open_log(path: Path) -> TextIO:
    """The log, opened to append, a line at a time. Raises UsageError, also for a file that is no log."""
    try:
        if path.is_file():
            with path.open("rb") as stream:
                if stream.read(len(LOG_BEGIN)) not in (b"", LOG_BEGIN):
                    raise UsageError(f"{path} is no log of ours, and nothing is added to it; give --log another name")
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise unwritable("--log", path, error) from None


def unwritable(option: str, path: Path, error: OSError) -> UsageError:
    """What to say of a file that an option names."""
    return UsageError(f"cannot write {path}: {error.strerror or error}; give {option} a file in a folder that exists")
