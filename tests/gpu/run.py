"""Run the GPU tests, or say that there is no GPU. `make gpu-test` calls this."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grounded_diffusion.kernels.cuda.device import gpu_name


def main() -> int:
    """Exit status of pytest; 0 where there is no NVIDIA GPU."""
    name = gpu_name()
    if name is None:
        print("skipped: no NVIDIA GPU (or no driver, or cuda-core is not installed)")
        return 0
    print(f"GPU tests on {name}")
    here = Path(__file__).parent
    return int(pytest.main([str(here), str(here.parent / "kernels" / "test_cuda_kernels.py"), *sys.argv[1:]]))


if __name__ == "__main__":
    raise SystemExit(main())
