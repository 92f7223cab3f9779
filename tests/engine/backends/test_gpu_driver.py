"""The real cuda-core, CudaDevice and CudaKernels over a driver of host memory: no GPU is needed.

The tests of the device loop and of the kernels run again in a process that finds that driver before any other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cuda.compile import build, sources

from grounded_diffusion.export.bundle import export_bundle
from grounded_diffusion.kernels.cuda import nvrtc
from grounded_diffusion.training.checkpoint import load_checkpoint

TESTS = Path(__file__).parents[2]
ARCHITECTURE = "sm_90"  # the driver's


@pytest.fixture(scope="module")
def driver(cuda_builds):
    """A folder with libcuda.so.1. NVRTC does not run beside it, so the cubins it is given come from the cache."""
    for stem in nvrtc.STEMS:
        nvrtc.cubin(stem, ARCHITECTURE)
    library = build(cuda_builds, sources(), entry="driver.cpp")
    folder = cuda_builds / "driver"
    folder.mkdir()
    (folder / "libcuda.so.1").symlink_to(library)
    return folder


@pytest.fixture(scope="module")
def bundles(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """The tiny bundle of each precision."""
    half = tmp_path_factory.mktemp("half") / "bundle"
    export_bundle(load_checkpoint(tiny_checkpoint), half, precision="fp16")
    return {"fp32": tiny_bundle, "fp16": half}


def run_tests(driver: Path, file: str, *options: str) -> str:
    """The last line of a test file's run, all of which has passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), *options]
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_kernels_launched_by_cuda_core(driver):
    assert "passed" in run_tests(driver, "kernels/test_cuda_kernels.py", "-k", "gpu")


@pytest.mark.parametrize("streams", ["lazy", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_device_loop_on_cuda_core(driver, bundles, precision, streams):
    options = [
        "--fake-driver",
        f"--tiny-bundle={bundles[precision]}",
        *(["--eager-streams"] if streams == "eager" else []),
    ]
    assert "skipped" not in run_tests(driver, "engine/backends/test_gpu_loop.py", *options)
