"""Metrics in Prometheus' text format, written to a file or served over HTTP.

Source of the format: "Text-based format", version 0.0.4, prometheus.io/docs/instrumenting/exposition_formats.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from socketserver import ThreadingTCPServer

from grounded_diffusion.errors import UsageError

PREFIX = "grounded_diffusion_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds: from a 64-pixel batch on a GPU to a 512-pixel batch on a few CPU cores.
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Labels = dict[str, str]
Sample = tuple[str, Labels, float]  # suffix of the name, labels, value


def family(name: str, kind: str, about: str, samples: Iterable[Sample]) -> str:
    """A metric with its HELP and TYPE lines; "" where it has no samples, so that what is unknown is left out."""
    lines = []
    for suffix, labels, value in samples:
        pairs = ",".join(f'{key}="{escape(text)}"' for key, text in labels.items())
        lines.append(f"{PREFIX}{name}{suffix}{{{pairs}}} {value!r}" if pairs else f"{PREFIX}{name}{suffix} {value!r}")
    head = [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]
    return "\n".join([*head, *lines, ""]) if lines else ""


def escape(text: str) -> str:
    """A label's value between its quotes."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class Histogram:
    """Counts of observed seconds, by BUCKETS."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds

    def samples(self) -> list[Sample]:
        """Cumulative buckets, sum and count."""
        bounds = [*map(repr, BUCKETS), "+Inf"]
        buckets = [("_bucket", {"le": bound}, n) for bound, n in zip(bounds, accumulate(self.counts), strict=True)]
        return [*buckets, ("_sum", {}, self.sum), ("_count", {}, sum(self.counts))]


def gpu_busy() -> list[tuple[str, float]]:
    """(index, busy share 0 to 1) of every GPU that nvidia-smi tells of; [] where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return []
    command = [tool, "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    cells = [[cell.strip() for cell in line.split(",")] for line in lines]
    # A GPU cut into MIG instances reports "[N/A]".
    return [(row[0], int(row[1]) / 100) for row in cells if len(row) == 2 and row[1].isdecimal()]


def parse_address(text: str) -> tuple[str, int]:
    """ "9100" or "0.0.0.0:9100" -> (host, port). Raises UsageError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--metrics-port must be a port, as in 9100, or HOST:PORT, not {text!r}")
    return host or "127.0.0.1", int(port)


def serve_metrics(address: tuple[str, int], render: Callable[[], str]) -> ThreadingTCPServer:
    """Serve `render()` at /metrics from a daemon thread, until `shutdown` and `server_close`. Raises UsageError."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = render().encode() if found else b"the metrics are at /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing of each request."""

    # Not HTTPServer: that looks its own name up, which can take seconds where there is no name server.
    class Server(ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    host, port = address
    try:
        server = Server(address, Handler)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"cannot serve metrics at {host}:{port}: {why}; choose another --metrics-port") from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
