"""Ray: actors that hold the engine and make shards as any worker does, and a driver that replaces dead ones.

driver ── ShardQueue: which shards are left, who has which ◄── next shard? ── actor: open_run, Worker
   └───── counts, for the monitor ◄──── what happened ─────────────────────┘
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.backends.open import backend_entry
from grounded_diffusion.engine.dataset.shards import read_shard
from grounded_diffusion.engine.dataset.storage.base import Storage
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.monitor import Monitor
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.run import Run
from grounded_diffusion.engine.runs.stop import Stop
from grounded_diffusion.errors import BackendError, UsageError

DEATHS = 3  # workers that may die on one shard, or before their first, until the run is given up
STORE = 100 << 20  # bytes of Ray's object store on this machine: only numbers travel
LOOK = 0.5  # seconds from one look at the workers to the next
PATIENCE = 60.0  # seconds without a worker after which the driver says what it waits for


def make_with_ray(run: Run, monitor: Monitor, shards: list[int]) -> None:
    """Have Ray's workers make shards. When this returns all have a record.

    Args:
        run: must have been started; every actor opens it with the same configuration.
        monitor: is told of what the workers do.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
        Interrupted: the run was asked to stop; the shards in progress are dropped.
        GroundedDiffusionError: as raised in an actor.
        BackendError: workers keep dying.
    """
    config = run.config
    slots = config.workers * (config.threads or 1) if config.workers else None
    with ray_cluster(config.ray or "", slots) as ray:
        RayDriver(ray, run, monitor).make(shards)


@contextlib.contextmanager
def ray_cluster(address: str, cpus: int | None = None) -> Iterator[Any]:
    """The ray module, connected.

    Args:
        address: of a running cluster, "auto" for this node's; "" takes RAY_ADDRESS, or else starts one on this machine.
        cpus: CPU slots of a cluster that is started here; None takes the cores.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("`ray` needs Ray; pip install 'grounded-diffusion[ray]'", "ray") from None
    address = address or os.environ.get("RAY_ADDRESS", "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if address:
            check_address(address)
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                "local", num_cpus=cpus, _node_ip_address="127.0.0.1", include_dashboard=False,
                object_store_memory=STORE, logging_level=logging.ERROR, log_to_driver=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UsageError(f"no Ray cluster at {address or 'this machine'}: {reason}") from None
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise OSError where nobody listens at a host:port; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


class ShardQueue:
    """Knows which shards are left and who is on which; an actor of its own, on the driver's node."""

    def __init__(self, shards: list[int]):
        self.waiting = deque(shards)
        self.taken: dict[int, set[int]] = {}  # by worker
        self.events: list[tuple[str, tuple, dict]] = []

    def take(self, worker: int) -> int | None:
        """The next shard for a worker; None when nothing is left."""
        mine = self.taken.setdefault(worker, set())
        if not self.waiting:
            return None
        mine.add(self.waiting[0])
        return self.waiting.popleft()

    def tell(self, worker: int, name: str, args: tuple, kwargs: dict) -> None:
        """Something that the driver's monitor is to know."""
        if name == "shard":
            self.taken[worker].discard(args[0])
        self.events.append((name, args, kwargs))

    def done(self, worker: int) -> None:
        """A worker has finished all shards that it took."""
        self.taken[worker].clear()

    def lost(self, worker: int) -> list[int]:
        """A worker is dead: its shards wait again, before all others."""
        shards = sorted(self.taken.pop(worker, ()))
        self.waiting.extendleft(reversed(shards))
        return shards

    def look(self) -> tuple[list[tuple[str, tuple, dict]], int, int]:
        """What happened since the last look; how many shards are not made; how many workers have come so far."""
        events, self.events = self.events, []
        return events, len(self.waiting) + sum(map(len, self.taken.values())), len(self.taken)


class RayMonitor(Monitor):
    """Tells the driver's monitor. Samples count once their shard is made, which no worker's death undoes.

    Args:
        send: takes the name of a method of Monitor, and its arguments.
        storage: where the records are.
    """

    def __init__(self, send: Callable[[str, tuple, dict], None], storage: Storage):
        super().__init__()
        self.send, self.storage = send, storage

    def shard(self, index: int) -> None:
        record = read_shard(self.storage, index)
        self.send("accepted", (record["accepted"],), {})
        for kind in ("rejected", "quarantined"):
            for entry in record[kind]:
                self.send(kind, (entry["reason"],), {"index": entry["index"]})
        self.send("shard", (index,), {})

    def elsewhere(self, samples: int) -> None:
        self.send("elsewhere", (samples,), {})

    def kept(self, samples: int) -> None:
        """Counted with its shard, as all are."""

    def batch(self, images: int, seconds: float) -> None:
        self.send("batch", (images, seconds), {})

    def failed(self, reason: str, **fields: Any) -> None:
        self.send("failed", (reason,), fields)


class Actor:
    """Holds the engine. Paths are those of the driver, and relative ones from the same folder where there is one."""

    def __init__(self, number: int, config: RunConfig, folder: str, queue: Any):
        self.number, self.config, self.queue = number, config, queue
        with contextlib.suppress(FileNotFoundError):  # Ray may have unpacked the job's files into folders of its own
            os.chdir(folder)
        self.worker = None

    def work(self) -> None:
        """Make shards until none is left. The model is opened here, so that its errors come back as they are."""
        import ray

        if self.worker is None:
            send = lambda *event: self.queue.tell.remote(self.number, *event)
            run = open_run(self.config, lambda line: None, Stop())
            self.worker = run.worker(RayMonitor(send, run.storage))
        self.worker.run(iter(lambda: ray.get(self.queue.take.remote(self.number)), None))
        ray.get(self.queue.done.remote(self.number))


class RayDriver:
    """The actors of one run. `ray` is the connected module."""

    def __init__(self, ray: Any, run: Run, monitor: Monitor):
        self.ray, self.run, self.monitor = ray, run, monitor
        resources, config = ray.cluster_resources(), run.config
        on_gpu, cpus = backend_entry(config.backend).device == "cuda", config.threads or 1
        slots = int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 1)) // cpus
        self.size = config.workers or max(1, slots)
        self.slot = "a GPU" if on_gpu else f"{cpus} CPUs"
        self.actor = ray.remote(num_cpus=cpus, num_gpus=1 if on_gpu else 0)(Actor)
        threads = config.threads or (None if on_gpu else 1)
        self.config = replace(config, overwrite=False, threads=threads, ray=None, workers=None)
        self.started = 0

    def make(self, shards: list[int]) -> None:
        """See `make_with_ray`."""
        self.deaths: Counter[int | None] = Counter()  # by shard; None: before the first
        self.busy: dict[Any, tuple[int, Any]] = {}  # call -> the actor's number and the actor
        self.idle: list[tuple[int, Any]] = []
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        self.queue = self.ray.remote(num_cpus=0)(ShardQueue).options(scheduling_strategy=here).remote(shards)
        try:
            for _ in range(min(self.size, len(shards))):
                self.start()
            self.watch()
        finally:
            for _, actor in [*self.idle, *self.busy.values()]:
                self.ray.kill(actor)
            self.ray.kill(self.queue)

    def watch(self) -> None:
        """Wait until all shards are made, and replace those who die."""
        since, told, left = time.monotonic(), False, 1
        while left:
            self.run.stop.check()
            done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=LOOK)
            for call in done:
                self.take_back(call)
            events, left, came = self.ray.get(self.queue.look.remote())
            for name, args, kwargs in events:
                getattr(self.monitor, name)(*args, **kwargs)
            if events:
                self.monitor.report()
            if not came and not told and time.monotonic() - since > PATIENCE:
                told = True
                self.run.say(f"no worker has come so far; each needs {self.slot} of the Ray cluster")

    def start(self) -> None:
        """Have one more worker: an actor that is idle, or else a new one, which may have to wait for its slot."""
        if self.idle:
            number, actor = self.idle.pop()
        else:
            number, actor = self.started, self.actor.remote(self.started, self.config, str(Path.cwd()), self.queue)
            self.started += 1
        self.busy[actor.work.remote()] = number, actor

    def take_back(self, call: Any) -> None:
        """A worker has ended, of its own or not."""
        number, actor = self.busy.pop(call)
        try:
            self.ray.get(call)
            self.idle.append((number, actor))
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause or error) from None
        except self.ray.exceptions.RayActorError:
            lost = self.ray.get(self.queue.lost.remote(number))
            self.deaths.update(lost or [None])
            ((worst, deaths),) = self.deaths.most_common(1)
            if deaths >= DEATHS:
                where = "before their first shard" if worst is None else f"on shard {worst}"
                raise BackendError(
                    f"{deaths} workers died {where}; Ray's logs say why (often it is memory: fewer workers to a "
                    "machine, or a smaller batch)"
                ) from None
            self.run.say("a worker died" + (f"; shard {', '.join(map(str, lost))} goes to another" if lost else ""))
            self.start()
