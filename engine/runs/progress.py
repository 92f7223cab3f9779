"""How a run shows that it moves: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

EVERY = 10.0  # seconds between lines
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


class Progress:
    """Images done, images per second and time left.

    Args:
        total, done: images of the run, and how many of them are there already.
        say: takes a line where there is no terminal.
    """

    def __init__(self, total: int, done: int, say: Callable[[str], None]):
        from rich.console import Console

        console = Console(stderr=True)
        self.total, self.say = total, say
        self.told = time.monotonic()
        self.bar = None
        if console.is_terminal and total > done:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("[bold]generating"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[about]}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, about="")
            self.bar.start()

    def show(self, done: int, rate: float, lost: str) -> None:
        """Tell of `done` images; `lost` says what was rejected or quarantined, if anything."""
        left = duration((self.total - done) / rate) + " left" if rate > 0 else ""
        about = ", ".join(filter(None, (f"{rate:.2f} images/s", left, lost)))
        if self.bar:
            self.bar.update(self.task, completed=done, about=about)
        elif time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.say(f"{done} of {self.total} images, {about}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def duration(seconds: float) -> str:
    """ "1:05", "2:00:09" or "3 d 04:10"."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400} d {seconds % 86400 // 3600:02}:{seconds % 3600 // 60:02}"
    hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
    return f"{hours}{seconds % 3600 // 60:{'02' if hours else ''}}:{seconds % 60:02}"
