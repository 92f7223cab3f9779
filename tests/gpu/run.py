"""Run the GPU tests, or fail where there is no GPU. `make gpu-test` calls this on a machine that has one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grounded_diffusion.kernels.cuda.device import gpu_name


def main() -> int:
    """Exit status of pytest; 1 where no NVIDIA GPU can be used."""
    name = gpu_name()
    if name is None:
        print("failed: no NVIDIA GPU that cuda-core can use (no GPU, no driver, or cuda-core is not installed)")
        return 1
    print(f"GPU tests on {name}")
    here = Path(__file__).parent
    return int(pytest.main([str(here), str(here.parent / "kernels" / "test_cuda_kernels.py"), *sys.argv[1:]]))


if __name__ == "__main__":
    raise SystemExit(main())
