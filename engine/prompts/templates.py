"""Sentences to put names into: the paper's one, and many that vary view, place and light."""

from __future__ import annotations

from itertools import cycle, islice

PAPER = ("a photograph of a {}", "a photograph of a {} and a {}")  # for one name and for two (Algorithm 2)

# Their numbers have no common divisor, so that going round all three at once meets each of the 504 combinations once,
# and any few sentences in a row differ in all three.
VIEWS = (
    "a photograph of", "a close-up of", "a wide shot of", "a view from above of", "a low-angle shot of",
    "a side view of", "a snapshot of",
)  # fmt: skip
PLACES = (
    "in an open field", "on a city street", "by the sea", "in front of a brick wall", "in a forest clearing",
    "in a large room", "on a gravel path", "in the snow",
)  # fmt: skip
LIGHTS = (
    "in soft morning light", "in bright sunshine", "on a cloudy day", "at dusk", "in the warm light of evening",
    "in thin fog", "after the rain", "lit from one side", "at night under lamps",
)  # fmt: skip


def varied(names: str) -> list[str]:
    """504 templates around "a {}" or "a {} and a {}"."""
    rounds = zip(cycle(VIEWS), cycle(PLACES), cycle(LIGHTS), strict=False)
    every = len(VIEWS) * len(PLACES) * len(LIGHTS)
    return [f"{view} {names} {place}, {light}" for view, place, light in islice(rounds, every)]


BUILT_IN = {"paper": ([PAPER[0]], [PAPER[1]]), "varied": (varied("a {}"), varied("a {} and a {}"))}
