"""How a run shows that it moves: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich import progress
from rich.console import Console

from grounded_diffusion.engine.checks import duration

EVERY = 10.0  # seconds between lines
SLOW = 30.0  # seconds of a first batch that are not for the most part the opening of the model
WINDOW = 300.0  # seconds over which the rate is taken: long against a batch, short against a change of neighbours


class Rate:
    """Images per second of the last WINDOW seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.points: deque[tuple[float, int]] = deque([(clock(), 0)])  # (time, images so far), a second apart
        self.images = 0

    def add(self, images: int) -> None:
        now = self.clock()
        self.images += images
        if now - self.points[-1][0] >= 1:
            self.points.append((now, self.images))
        while len(self.points) > 2 and now - self.points[1][0] > WINDOW:
            self.points.popleft()

    @property
    def value(self) -> float:
        since, images = self.points[0]
        return (self.images - images) / max(self.clock() - since, 1e-9)


class Pace:
    """Images a second that the model makes, over the last WINDOW seconds, from the ends of its batches.

    Batches that are made at once end together, so only every `lanes`-th counts. The first one, in which sessions are
    opened, does so only where it took so long that this does not matter.

    Args:
        lanes: batches at once.
    """

    def __init__(self, lanes: int = 1, clock: Callable[[], float] = time.monotonic):
        self.lanes, self.clock, self.began = lanes, clock, clock()
        self.points: deque[tuple[float, int]] = deque()  # (time, images so far)
        self.images = self.batches = self.last = 0

    def batch(self, images: int) -> None:
        """A batch has ended."""
        now = self.clock()
        if not self.batches and now - self.began >= SLOW:
            self.points.append((self.began, images - self.lanes * images))
        self.images += images
        self.last = images
        if self.batches % self.lanes == 0:
            self.points.append((now, self.images))
        self.batches += 1
        while len(self.points) > 2 and now - self.points[1][0] > WINDOW:
            self.points.popleft()

    @property
    def value(self) -> float:
        """0 where it is not known."""
        if len(self.points) < 2:
            return 0.0
        (since, before), (now, images) = self.points[0], self.points[-1]
        return (images - before) / max(now - since, 1e-9)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        total: samples of the run, or of this process's share of it.
        done: samples that are settled, those of earlier runs and of other workers included.
        accepted, rejected, quarantined: what has come of those that this run has settled.
        images_per_second: settled, over the last minutes.
        seconds_left: None as long as it is not known, which takes two rounds of batches.
    """

    total: int
    done: int
    accepted: int
    rejected: int
    quarantined: int
    images_per_second: float
    seconds_left: float | None = None


class ProgressBar:
    """Images done, images per second and time left: a bar on a terminal and in a notebook, lines elsewhere.

    Args:
        total, done: images of the run, and how many of them are there already.
        say: takes a line where there is neither.
    """

    def __init__(self, total: int, done: int, say: Callable[[str], None]):
        console = Console(stderr=True)
        self.say = say
        self.told = time.monotonic()
        self.bar = None
        shown = importlib.util.find_spec("ipywidgets") if console.is_jupyter else console.is_terminal
        if shown and total > done:
            self.bar = progress.Progress(
                progress.TextColumn("[bold]generating"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[about]}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, about="")
            self.bar.start()

    def show(self, now: Progress) -> None:
        """Tell how far the run is."""
        parts = [f"{now.images_per_second:.2f} images/s"]
        if now.seconds_left is not None:
            parts.append(f"{duration(now.seconds_left)} left")
        parts += [f"{n} {what}" for n, what in ((now.rejected, "rejected"), (now.quarantined, "quarantined")) if n]
        about = ", ".join(parts)
        if self.bar:
            self.bar.update(self.task, completed=now.done, about=about)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.say(f"{now.done} of {now.total} images, {about}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
