"""Engines of Stable Diffusion 1.5's sizes, in FP16 at 512x512, are built on a machine without a GPU within 16 GB."""

import os
import subprocess
import sys

import pytest

from grounded_diffusion.bundle import GRAPHS, open_bundle

LIMIT = 16e9  # bytes


def export(*arguments: str) -> tuple[str, float]:
    """Run gd-export by itself: what it said, and its peak memory in bytes."""
    command = [sys.executable, "-m", "grounded_diffusion.export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return said, usage.ru_maxrss * 1024


@pytest.mark.slow
def test_stable_diffusion_sizes_build_within_16_gb(sd15, tmp_path):
    out = str(tmp_path / "bundle")
    export(*sd15, "--out", out, "--precision", "fp16", "--no-verify")
    assert open_bundle(out).manifest.image_size == (512, 512)
    peaks = {}
    for graph in GRAPHS:
        command = ("--bundle", out, "--engine", "tensorrt-rtx", "--sm", "89", "--guided-only", "--graph", graph)
        said, peaks[graph] = export(*command)
        print(said.splitlines()[-1], f"with {peaks[graph] / 1e9:.1f} GB for", graph)
    assert max(peaks.values()) < LIMIT, peaks
