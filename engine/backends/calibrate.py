"""How many images to a batch, and how many batches at once: measured once on each machine and remembered.

One call on all threads waits at every operation for the slowest of them; several calls with fewer threads each do
not. Which is faster depends on the model, the processor and its load, so it is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from grounded_diffusion.bundle import MANIFEST, UNET, Bundle, sha256
from grounded_diffusion.cache import cache_folder, write_cached
from grounded_diffusion.engine.backends.host import LATENT_CELLS, default_batch
from grounded_diffusion.engine.backends.open import DEFAULT_BACKEND, open_backend
from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.options import MAX_BATCH, Options
from grounded_diffusion.reading import Count, Misfit, decode

CALIBRATED = 256  # images from which it pays to try which batch is fastest on this machine
BUDGET = 25.0  # seconds; at large images only a few candidates are tried
TIMED = 1.0  # seconds of calls to a candidate in each of two rounds, at least one call a lane
WORTH = 1.015  # a larger candidate must be faster by this, or the smaller one, with its smaller memory, is taken


@dataclass(frozen=True, slots=True)
class BatchAndLanes:
    """Images to a batch, and batches at once; `rate` is guided calls of one image a second with them."""

    batch: Count
    lanes: Count
    rate: float = field(default=0.0, compare=False)


def calibrate(
    bundle: Bundle,
    options: Options,
    threads: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    backend: str = DEFAULT_BACKEND,
) -> BatchAndLanes:
    """The fastest batch and lanes on this machine: remembered, or measured now within half a minute.

    Args:
        options: decide the image size; a batch that they fix is kept, and only the lanes are tried.
        threads: CPU threads in all; None takes all cores.
        report: told what has been measured.
        backend: name of a backend on the CPU.
    """
    threads = threads or usable_cores()
    if found := remembered(bundle, options, threads, backend):
        return found
    height, width = latent_size(bundle, options)
    tries = list(candidates(options, height * width, threads))
    rates = measure(lambda lanes: open_backend(backend, bundle, threads=threads, lanes=lanes), bundle, tries,
                    (height, width))  # fmt: skip
    chosen = choose(rates)
    for tried, rate in rates.items():
        report(f"{backend}, batch {tried.batch} x {tried.lanes}: {rate:.2f} guided calls of one image a second")
    with contextlib.suppress(OSError):  # a cache that cannot be written is measured again
        write_cached(cache_file(bundle, options, threads, backend), json.dumps(asdict(chosen)).encode())
    return chosen


def remembered(
    bundle: Bundle, options: Options, threads: int | None = None, backend: str = DEFAULT_BACKEND
) -> BatchAndLanes | None:
    """What `calibrate` has found before; None where it would have to measure."""
    with contextlib.suppress(OSError, Misfit):
        return decode(cache_file(bundle, options, threads or usable_cores(), backend).read_bytes(), BatchAndLanes)
    return None


def latent_size(bundle: Bundle, options: Options) -> tuple[int, int]:
    """(h, w) of the latents. Raises UsageError for a size that the model cannot make."""
    height, width = options.image_size(bundle.manifest)
    return height // bundle.manifest.vae_scale_factor, width // bundle.manifest.vae_scale_factor


def cache_file(bundle: Bundle, options: Options, threads: int, backend: str) -> Path:
    """Where what was measured is remembered."""
    asked = {
        "model": sha256(bundle.file(MANIFEST)),
        "latents": list(latent_size(bundle, options)),
        "batch": options.batch,
        "threads": threads,
        "host": [platform.node(), platform.machine()],
    }
    if backend != DEFAULT_BACKEND:
        asked["backend"] = backend
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "placements" / f"{key}.json"


def candidates(options: Options, cells: int, threads: int) -> Iterator[BatchAndLanes]:
    """What to try, the safest first: lanes double up to one a thread, batches around the default."""
    usual = options.batch or default_batch(cells)
    batches = [usual] if options.batch else [usual, *{max(1, usual // 2), min(2 * usual, MAX_BATCH)} - {usual}]
    lanes = 1
    while lanes <= threads:
        for batch in batches:
            if lanes == 1 or lanes * batch * cells <= 16 * LATENT_CELLS:  # keeps the memory in bounds
                yield BatchAndLanes(batch, lanes)
        lanes *= 2


def measure(
    open_with: Callable[[int], Backend], bundle: Bundle, tries: list[BatchAndLanes], latents: tuple[int, int]
) -> dict[BatchAndLanes, float]:
    """Guided network calls for one image a second, of as many candidates as fit the budget; at least one.

    The better of two rounds counts: what disturbs a candidate in one hardly does so in the other.

    Args:
        open_with: opens the backend with so many lanes.
    """
    rates: dict[BatchAndLanes, float] = {}
    started, backend = time.monotonic(), None
    for tried in [*tries, *tries]:
        if rates and time.monotonic() - started > BUDGET:
            break
        if backend is None or backend.lanes != tried.lanes:
            if backend:
                backend.close()
            backend = open_with(tried.lanes)
        rates[tried] = max(rates.get(tried, 0.0), rate(backend, bundle, tried, latents))
    if backend:
        backend.close()
    return rates


def rate(backend: Backend, bundle: Bundle, tried: BatchAndLanes, latents: tuple[int, int]) -> float:
    """Images a second through one guided call, all lanes at once."""
    manifest, images = bundle.manifest, tried.batch
    noise = np.random.default_rng(0).standard_normal((images, manifest.latent_channels, *latents), np.float32)
    inputs = {
        "latents": noise,
        "timestep": np.full(images, 500, np.float32),
        "context": np.zeros((2 * images, manifest.context_rows, manifest.context_dim), np.float32),
    }

    def lane(rounds: int) -> None:
        for _ in range(rounds):
            backend.run(UNET, inputs)

    with ThreadPoolExecutor(tried.lanes) as pool:

        def seconds(rounds: int) -> float:
            start = time.perf_counter()
            list(pool.map(lane, [rounds] * tried.lanes))
            return time.perf_counter() - start

        seconds(1)  # opens the session, learns the shapes, makes the buffers
        rounds = max(1, round(TIMED / seconds(1)))
        return tried.lanes * tried.batch * rounds / seconds(rounds)


def choose(rates: dict[BatchAndLanes, float]) -> BatchAndLanes:
    """The fastest, unless a smaller one is nearly as fast."""
    best = max(rates.values())
    fast = [tried for tried, rate in rates.items() if rate * WORTH >= best]
    chosen = min(fast, key=lambda tried: (tried.lanes * tried.batch, tried.lanes))
    return replace(chosen, rate=rates[chosen])
