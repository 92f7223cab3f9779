"""Metrics for Prometheus, kept in a file or served over HTTP: what prometheus_client does not know of a run. And the
file of its log."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, TextIO, cast

from prometheus_client import MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from grounded_diffusion.errors import UsageError

LOG_BEGIN = b'{"time": "'  # every log of ours
PREFIX = "grounded_diffusion_"
# Upper bounds in seconds: from a 64-pixel batch on a GPU to a 512-pixel batch on a few CPU cores.
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


def gauge(name: str, about: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    """A gauge; with a label, one for each of its values."""
    return add(GaugeMetricFamily(PREFIX + name, about, labels=[label] if label else []), value)


def counter(name: str, about: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    """A counter, whose name Prometheus ends in _total; with a label, one for each of its values."""
    return add(CounterMetricFamily(PREFIX + name, about, labels=[label] if label else []), value)


def add(family: GaugeMetricFamily | CounterMetricFamily, value: float | Mapping[str, float]) -> Metric:
    """A family with its samples: none where a mapping is empty."""
    values = {(label,): number for label, number in value.items()} if isinstance(value, Mapping) else {(): value}
    for labels, number in values.items():
        family.add_metric(labels, number)
    return family


class Histogram:
    """Counts of observed seconds, by BUCKETS."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def family(self, name: str, about: str) -> Metric:
        """Cumulative buckets, sum and count."""
        bounds = [*map(repr, BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self.counts), strict=True))
        return HistogramMetricFamily(PREFIX + name, about, buckets=buckets, sum_value=self.sum)


def registry_of(collector: Collector) -> CollectorRegistry:
    """A registry of one collector, and of nothing else in this process."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def gpu_busy() -> dict[str, float]:
    """Busy share, 0 to 1, of every GPU that nvidia-smi tells of, by its index; {} where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return {}
    command = [tool, "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    # A GPU cut into MIG instances reports "[N/A]".
    return {row[0]: int(row[1]) / 100 for row in cells if len(row) == 2 and row[1].isdecimal()}


def parse_address(address: str | int) -> tuple[str, int]:
    """9100 or "0.0.0.0:9100" -> (host, port). Raises UsageError."""
    host, _, port = str(address).rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"metrics_port must be a port, as in 9100, or HOST:PORT, not {address!r}", "metrics_port")
    return host or "127.0.0.1", int(port)


def serve_metrics(address: tuple[str, int], registry: CollectorRegistry) -> ThreadingTCPServer:
    """Serve /metrics from a daemon thread, until `shutdown` and `server_close`. Raises UsageError."""

    class Handler(MetricsHandler):
        def do_GET(self) -> None:  # noqa: N802 - as http.server calls it
            if self.path.partition("?")[0] == "/metrics":
                super().do_GET()
            else:
                self.send_error(404, "the metrics are at /metrics")

    Handler.registry = registry

    # Not HTTPServer: that looks its own name up, which can take seconds where there is no name server.
    class Server(ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    host, port = address
    try:
        server = Server(address, cast(Any, Handler))  # a class made by the library, of a type it does not tell
    except OSError as error:
        line = f"cannot serve metrics at {host}:{port}: {error.strerror or error}; choose another metrics_port"
        raise UsageError(line, "metrics_port") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def check_log(path: Path) -> None:
    """Raise UsageError where a log cannot be appended to a file."""
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.is_file():
            with path.open("rb") as stream:
                if stream.read(len(LOG_BEGIN)) not in (b"", LOG_BEGIN):
                    line = f"{path} is no log of ours, and nothing is added to it; give `log` another name"
                    raise UsageError(line, "log")
    except OSError as error:
        raise unwritable("log", path, error) from None


def open_log(path: Path) -> TextIO:
    """The log, opened to append, a line at a time. Raises UsageError, also for a file that is no log."""
    check_log(path)
    try:
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise unwritable("log", path, error) from None


def unwritable(field: str, path: Path, error: OSError) -> UsageError:
    """What to say of a file that a field names."""
    line = f"cannot write {path}: {error.strerror or error}; give `{field}` a file in a folder that exists"
    return UsageError(line, field)
