"""Bandwidth of every kernel against a copy of the same machine: `python -m grounded_diffusion.bench.kernels`.

Bytes are those an operation must move: each input read once, each output written once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.kernels import StepCoefficients, cfg_step, image_epilogue, mask_epilogue
from grounded_diffusion.kernels.cuda.device import DeviceArray, gpu_name
from grounded_diffusion.kernels.cuda.launch import STATS_BYTES, CudaKernels, MaskPointers, StepPointers, pack_step

COPY_BYTES = 256 << 20  # far beyond any cache
SIZES = ((8, 64), (1, 512), (8, 512))  # (batch, pixels a side); the latent grid is an eighth
OBJECTS = 4
STEP = StepCoefficients(guidance_scale=7.5, cx=0.0, co=1.0, a=0.99, b=[0.05, -0.02])  # a second-order solver, guided


@dataclass(frozen=True, slots=True)
class Row:
    """One measured operation: median and spread of its seconds, and the bandwidth they mean."""

    where: str
    name: str
    size: str
    bytes: int
    median_s: float
    spread_s: float

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes / self.median_s / 1e9


def inputs(batch: int, side: int) -> dict[str, np.ndarray]:
    """Arrays of one size: latents [B,4,h,w], model output [2B,4,h,w], history [1,...], image and mask logits."""
    rng = np.random.default_rng(0)
    grid = side // 8
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return {
        "output": normal(2 * batch, 4, grid, grid),
        "latents": normal(batch, 4, grid, grid),
        "history": normal(1, batch, 4, grid, grid),
        "image": normal(batch, 3, side, side),
        "logits": normal(batch, OBJECTS, grid, grid),
        "valid": np.ones((batch, OBJECTS), np.bool_),
    }


def traffic(batch: int, side: int) -> dict[str, int]:
    """Bytes each operation must move in FP32."""
    latent, pixels = batch * 4 * (side // 8) ** 2, batch * side * side
    return {
        "cfg_step": 4 * latent * (2 + 1 + 1 + 1 + 1 + 1),  # output x2, x, past m; m, x', next input
        "image_epilogue": pixels * 3 * (4 + 1),
        "mask_epilogue": batch * OBJECTS * (side // 8) ** 2 * 4 + pixels * (OBJECTS + 1),
    }


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and half the interquartile range of one call's seconds; short calls are timed several at a time."""
    run()
    start = time.perf_counter()
    run()
    inner = max(1, int(2e-3 / max(time.perf_counter() - start, 1e-7)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            run()
        times.append((time.perf_counter() - start) / inner)
    low, median, high = statistics.quantiles(times, n=4)
    return median, (high - low) / 2


def host_rows(repeats: int) -> Iterator[Row]:
    """Copy and kernels on one CPU thread."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)
    yield Row("host", "copy", "256 MiB", 2 * COPY_BYTES, *seconds(lambda: np.copyto(target, source), repeats))
    for batch, side in SIZES:
        given, moved = inputs(batch, side), traffic(batch, side)
        new, following = np.empty_like(given["latents"]), np.empty_like(given["latents"])
        picture = np.empty((batch, side, side, 3), np.uint8)
        runs = {
            "cfg_step": lambda g=given, n=new, f=following: cfg_step(
                STEP, g["output"], g["latents"], g["history"], out_latents=n, out_input=f
            ),
            "image_epilogue": lambda g=given, p=picture: image_epilogue(g["image"], p),
            "mask_epilogue": lambda g=given, s=side: mask_epilogue(g["logits"], g["valid"], (s, s)),
        }
        for name, run in runs.items():
            yield Row("host", name, f"{batch} x {side}", moved[name], *seconds(run, repeats))


def cuda_rows(repeats: int) -> Iterator[Row]:
    """Copy and kernels on the first GPU, timed by the host around 20 launches and one synchronisation."""
    from cuda.bindings import driver

    kernels = CudaKernels()
    stream = kernels.device.create_stream()
    put = lambda array: DeviceArray(array, kernels.device, stream)

    def timed(launch: Callable[[], Any]) -> tuple[float, float]:
        def run() -> None:
            for _ in range(20):
                launch()
            stream.sync()

        median, spread = seconds(run, repeats)
        return median / 20, spread / 20

    source, target = put(np.ones(COPY_BYTES, np.uint8)), put(np.ones(COPY_BYTES, np.uint8))
    copy = lambda: driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, COPY_BYTES, int(stream.handle))
    yield Row("cuda", "copy", "256 MiB", 2 * COPY_BYTES, *timed(copy))
    for batch, side in SIZES:
        for name, launch in cuda_launches(kernels, stream, put, batch, side).items():
            yield Row("cuda", name, f"{batch} x {side}", traffic(batch, side)[name], *timed(launch))


def cuda_launches(kernels: CudaKernels, stream: Any, put: Callable, batch: int, side: int) -> dict[str, Callable]:
    """One launch per operation on buffers of one size, FP32."""
    given = {name: put(array) for name, array in inputs(batch, side).items()}
    row = put(pack_step(STEP, slots=1).view(np.uint8))
    new, following = put(given["latents"].numpy()), put(given["latents"].numpy())
    picture = put(np.empty((batch, side, side, 3), np.uint8))
    count, size = batch * OBJECTS, (side, side)
    made = [(batch * side * side, 1), (count, 8), (4 * count, 4), (count, 4), (count, STATS_BYTES)]
    names = ("labels", "area", "box", "score", "stats")
    outputs = {n: put(np.empty(number * width, np.uint8)) for n, (number, width) in zip(names, made, strict=True)}
    masks = put(np.empty(count * side * side, np.uint8))
    shape = (batch, OBJECTS, side // 8, side // 8)
    at = {name: array.pointer for name, array in given.items()}
    elements = batch * 4 * (side // 8) ** 2
    step = StepPointers(row.pointer, at["output"], at["latents"], new.pointer, following.pointer, history=at["history"])
    mask = MaskPointers(
        at["logits"], at["valid"], masks=masks.pointer, **{name: array.pointer for name, array in outputs.items()}
    )
    return {
        "cfg_step": lambda: kernels.cfg_step(stream, step, count=elements, guided=True, half=False),
        "image_epilogue": lambda: kernels.image_epilogue(
            stream, at["image"], picture.pointer, batch=batch, size=size, half=False
        ),
        "mask_epilogue": lambda: kernels.mask_epilogue(stream, mask, shape=shape, size=size, half=False),
    }


def print_table(rows: list[Row]) -> None:
    """Rows as a table; the last column is the share of the copy's bandwidth on the same device."""
    copies = {row.where: row.gigabytes_per_second for row in rows if row.name == "copy"}
    print(f"{'where':6}{'operation':16}{'size':>10}{'median':>12}{'spread':>11}{'GB/s':>9}{'of copy':>9}")
    for row in rows:
        share = row.gigabytes_per_second / copies[row.where]
        print(
            f"{row.where:6}{row.name:16}{row.size:>10}{row.median_s * 1e6:>9.1f} us{row.spread_s * 1e6:>8.1f} us"
            f"{row.gigabytes_per_second:>9.2f}{share:>8.0%}"
        )


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m grounded_diffusion.bench.kernels", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats of every row (default 15)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = list(host_rows(options.repeats))
    name = gpu_name()
    if name is None:
        print("no NVIDIA GPU: host only")
    else:
        rows += cuda_rows(options.repeats)
    print_table(rows)
    if options.json:
        record = {"cpu": platform.processor() or platform.machine(), "gpu": name, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
