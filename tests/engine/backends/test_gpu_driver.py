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

from grounded_diffusion.kernels.cuda import nvrtc

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


def run_tests(driver: Path, file: str, *options: str) -> str:
    """The last line of a test file's run, all of which has passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file), *options]
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_kernels_launched_by_cuda_core(driver):
    assert "passed" in run_tests(driver, "kernels/test_cuda_kernels.py", "-k", "gpu")


def test_the_device_of_cuda_core(driver):
    assert "passed" in run_tests(driver, "gpu/test_cuda_device.py")


@pytest.mark.parametrize(("bundle", "streams"), [("tiny", "lazy"), ("tiny", "eager"), ("half", "lazy")])
def test_the_device_loop_on_cuda_core(driver, request, bundle, streams):
    options = ["--fake-driver", f"--tiny-bundle={request.getfixturevalue(f'{bundle}_bundle')}"]
    options += ["--eager-streams"] if streams == "eager" else []
    assert "skipped" not in run_tests(driver, "engine/backends/test_gpu_loop.py", *options)
