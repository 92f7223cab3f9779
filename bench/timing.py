"""Timing: medians and quartiles of repeated calls, and systems that take turns, A B A B."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAUSE = 0.2  # seconds between turns, in which the other system's waiting threads go to sleep


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third; both the value itself where there is but one."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def record(self) -> dict[str, Any]:
        """JSON-ready: median, quartiles and all values."""
        low, high = self.quartiles
        return {"median_s": self.median, "q1_s": low, "q3_s": high, "seconds": list(self.seconds)}


def clock(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def repeat(run: Callable[[], Any], repeats: int) -> Timing:
    """`repeats` timed runs after one that warms up."""
    run()
    return Timing(tuple(clock(run) for _ in range(repeats)))


def alternate(
    systems: Mapping[str, Callable[[int], Any]],
    rounds: Callable[[float], int],
    report: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Timing], list[str]]:
    """Run every system once a round, in the same order, so that a machine that slows down slows all alike.

    Args:
        systems: by name, what runs one round, given the round's number.
        rounds: how many, given the seconds of the first.
        report: told a line after each round.

    Returns:
        timings by name; the names in the order in which they ran.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    order, number, most = [], 0, 1
    while number < most:
        for name, run in systems.items():
            time.sleep(PAUSE)
            seconds[name].append(clock(lambda run=run: run(number)))  # noqa: B023
            order.append(name)
        number += 1
        most = rounds(sum(s[0] for s in seconds.values()))
        report(f"round {number}/{most}: " + ", ".join(f"{name} {s[-1]:.2f} s" for name, s in seconds.items()))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}, order
