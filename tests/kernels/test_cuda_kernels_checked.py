"""What `test_cuda_kernels.py` would notice: accesses beyond an array, and kernels that are wrong in one place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cuda.compile import SANITIZED, build, compilers_library, sources

TESTS = Path(__file__).with_name("test_cuda_kernels.py")
# One thing wrong in each: a bound, an index, a mask, an order.
MUTANTS = [
    ("cfg_step", "if (i < count) {", "{"),
    ("cfg_step", "load(output[count + i])", "load(output[i])"),
    ("cfg_step", "bad[step.row * batch + i / (count / batch)]", "bad[step.row * batch + i % batch]"),
    ("cfg_step", "step.slot[k] * count + i", "step.slot[k] * count"),
    ("cfg_step", "store(out_input[i], next * step.next_scale)", "store(out_input[i], next)"),
    ("image_epilogue", "load(from[c * pixels])", "load(from[c])"),
    ("image_epilogue", "i < count; i += stride", "i <= count; i += stride"),
    ("image_epilogue", "bad[b] = 1", "bad[0] = 1"),
    ("mask_epilogue", "first + 31 - __clz(word)", "first + 32 - __clz(word)"),
    ("mask_epilogue", "if (y >= height) return;", "if (y >= height || x >= width) return;"),
    ("mask_epilogue", "* gridDim.x + blockIdx.x] = word", "* (width / 32) + blockIdx.x] = word"),
    ("mask_epilogue", "if (i < count) stats[i] =", "if (i < count - 1) stats[i] ="),
    ("mask_epilogue", "atomicMin(&stats[at].top, y)", "atomicMax(&stats[at].top, y)"),
    ("mask_epilogue", "value > best", "value >= best"),
    ("mask_epilogue", "step; step /= 2", "step > 1; step /= 2"),
]


def check(library: Path, **environment: str) -> subprocess.CompletedProcess:
    """The kernels' tests on a library."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", str(TESTS)]
    command += ["-k", "cpu and not fma and not reversed", f"--cuda-kernels={library}"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def mutant(stem: str, right: str, wrong: str) -> dict[str, str]:
    """The kernels' sources with one thing changed."""
    texts = sources()
    assert texts[stem].count(right) == 1, "the kernel has changed; change its mutant with it"
    return texts | {stem: texts[stem].replace(right, wrong)}


def test_no_kernel_goes_beyond_its_arrays(cuda_builds):
    """Under the address and the undefined behaviour sanitizer, which have to be loaded before Python."""
    environment = {"LD_PRELOAD": compilers_library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    done = check(build(cuda_builds, sources(), SANITIZED), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reads_too_far = mutant("image_epilogue", "load(from[c * pixels])", "load(from[(c + 1) * pixels])")
    done = check(build(cuda_builds, reads_too_far, SANITIZED), **environment)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(("stem", "right", "wrong"), MUTANTS)
def test_a_wrong_kernel_is_noticed(cuda_builds, stem, right, wrong):
    done = check(build(cuda_builds, mutant(stem, right, wrong)))
    assert done.returncode == 1 or done.returncode < 0, done.stdout + done.stderr
