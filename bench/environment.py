"""What a measurement was made on: machine, versions, model; the most it could do; and memory."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion import __version__
from grounded_diffusion.bench.timing import repeat
from grounded_diffusion.bundle import MANIFEST, Bundle, sha256
from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.kernels.cuda.device import gpu_name

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "diffusers", "transformers", "onnx", "tensorrt",
)  # fmt: skip
CPU_MATRIX = 2048  # side of the product that tells a CPU's rate: 17 GFLOP, 48 MB
GPU_MATRIX = 8192


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_record() -> dict[str, str] | None:
    """Name, driver and memory of the first NVIDIA GPU as nvidia-smi tells them; None where there is none."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(("name", "driver", "memory"), (part.strip() for part in said.split(",")), strict=False))


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(bundle: Bundle | None, threads: int) -> dict[str, Any]:
    """The record that goes with every result. `load` tells whether the machine was busy with something else."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),
        "gpu": gpu_record(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"grounded-diffusion": __version__}
        | {name: found for name in PACKAGES if (found := installed(name))},
        "bundle": None if bundle is None else sha256(bundle.path / MANIFEST),
    }


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU that can be used or named."""
    return gpu_name() is not None or gpu_record() is not None


def cpu_bound(precision: str = "fp32", repeats: int = 5) -> dict[str, float]:
    """Operations a second of a large matrix product and a large convolution: torch's in "fp32" or "bf16", NumPy's."""
    rng, side = np.random.default_rng(0), CPU_MATRIX
    a, b = (rng.standard_normal((side, side), dtype=np.float32) for _ in range(2))
    rates = {"numpy fp32 matmul": 2 * side**3 / min(repeat(lambda: a @ b, repeats).seconds)}
    try:
        import torch
    except ImportError:
        return rates
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, y = torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)
    rates[f"torch {precision} matmul"] = 2 * side**3 / min(repeat(lambda: x @ y, repeats).seconds)
    image, weight = torch.randn(8, 256, 64, 64, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
    run = lambda: torch.nn.functional.conv2d(image, weight, padding=1)
    rates[f"torch {precision} convolution"] = 2 * image.numel() * 256 * 9 / min(repeat(run, repeats).seconds)
    return rates


def gpu_bound(repeats: int = 20) -> dict[str, float]:
    """FP16 and BF16 operations a second of a large matrix product on the GPU; empty without torch for CUDA."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    rates, side = {}, GPU_MATRIX
    for dtype in (torch.float16, torch.bfloat16):
        a = torch.randn(side, side, device="cuda", dtype=dtype)

        def run(a=a) -> None:
            a @ a
            torch.cuda.synchronize()

        rates[f"torch {str(dtype).removeprefix('torch.')} matmul"] = 2 * side**3 / min(repeat(run, repeats).seconds)
    return rates


def peak_rss() -> int:
    """Peak resident memory of this process in bytes. (getrusage's figure would be the parent's, right after a fork.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU, by all processes; None where there is none."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
