"""Ray: a driver that hands shards to actors, each of which holds an engine and makes shards as any worker does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from grounded_diffusion.errors import BackendError, UsageError

DEATHS = 3  # workers that may die on one shard, or before their first, until the run is given up
STORE = 100 << 20  # bytes of Ray's object store on this machine: only numbers travel
LOOK = 0.5  # seconds after which the driver looks whether it is to stop


class ShardMaker(Protocol):
    """What an actor opens once and then uses."""

    def make(self, shard: int) -> Any:
        """Make a shard, its record included; what this returns goes to the driver."""
        ...


class Actor:
    """Holds the engine. It is opened by a call, not by the constructor, so that its errors come back as they are."""

    def __init__(self, open_maker: Callable[[], ShardMaker]):
        self.open_maker = open_maker

    def open(self) -> None:
        self.maker = self.open_maker()

    def make(self, shard: int) -> Any:
        return self.maker.make(shard)


@contextlib.contextmanager
def ray_cluster(address: str | None, cpus: int | None = None) -> Iterator[Any]:
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
        raise UsageError("--ray needs Ray; pip install 'grounded-diffusion[ray]'") from None
    address = address or os.environ.get("RAY_ADDRESS")
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


class Crew:
    """Actors, and the shards that are left to make.

    Args:
        ray: the connected module.
        open_maker: opens an engine; called in each actor.
        workers: actors at most; None takes one for each GPU, or for each slot of CPUs where there are none.
        threads: CPUs of an actor; None takes one.
        say: takes a line about a worker that died.
    """

    def __init__(
        self,
        ray: Any,
        open_maker: Callable[[], ShardMaker],
        *,
        workers: int | None = None,
        threads: int | None = None,
        say: Callable[[str], None],
    ):
        self.ray, self.open_maker, self.say = ray, open_maker, say
        resources = ray.cluster_resources()
        self.gpus, self.cpus = int(resources.get("GPU", 0)), threads or 1
        self.workers = workers or self.gpus or max(1, int(resources.get("CPU", 1)) // self.cpus)
        self.actor = ray.remote(num_cpus=self.cpus, num_gpus=1 if self.gpus else 0)(Actor)
        self.deaths: Counter[int | None] = Counter()  # by shard; None: before the first
        self.busy: dict[Any, tuple[Any, int | None]] = {}  # call -> its actor, and the shard that it makes

    def run(self, shards: Iterable[int], stop: Callable[[], bool]) -> Iterator[tuple[int, Any]]:
        """Yield (shard, what its maker returned) as they get done, in any order.

        Args:
            shards: to make.
            stop: asked now and then; once it says so, the shards in hand are dropped and this returns.

        Raises:
            GroundedDiffusionError: as raised in an actor.
            BackendError: workers keep dying.
        """
        waiting, idle = deque(shards), []
        try:
            for _ in range(min(self.workers, len(waiting))):
                self.start()
            while (waiting or any(shard is not None for _, shard in self.busy.values())) and not stop():
                while waiting and idle:
                    actor, shard = idle.pop(), waiting.popleft()
                    self.busy[actor.make.remote(shard)] = actor, shard
                done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=LOOK)
                for call in done:
                    actor, shard = self.busy.pop(call)
                    try:
                        result = self.ray.get(call)
                    except self.ray.exceptions.RayActorError:
                        self.bury(shard)
                        if shard is not None:
                            waiting.appendleft(shard)
                    except self.ray.exceptions.RayTaskError as error:
                        raise (error.cause or error) from None
                    else:
                        idle.append(actor)
                        if shard is not None:
                            yield shard, result
        finally:
            for actor in [*idle, *(actor for actor, _ in self.busy.values())]:
                self.ray.kill(actor)

    def start(self) -> None:
        """Ask for one more actor. It gets no shard before it is up: slots may be taken, or machines still to come."""
        actor = self.actor.remote(self.open_maker)
        self.busy[actor.open.remote()] = actor, None

    def bury(self, shard: int | None) -> None:
        """Replace a dead actor. Raises BackendError where it keeps happening."""
        what = "before its first shard" if shard is None else f"at shard {shard}"
        self.deaths[shard] += 1
        if self.deaths[shard] >= DEATHS:
            raise BackendError(
                f"{DEATHS} workers died {what}; Ray's logs say why (often memory: fewer workers to a machine, or a "
                "smaller --batch)"
            )
        self.say(f"a worker died {what}; another one takes over")
        self.start()
