"""Devices of torch."""

from __future__ import annotations

import torch

from grounded_diffusion.errors import UsageError


def check_device(name: str) -> None:
    """Raise UsageError unless torch can compute on a device, by its name for torch."""
    try:
        torch.zeros(1, device=name)
    except Exception:  # RuntimeError, AssertionError, NotImplementedError: each device has its own
        line = f"there is no device {name!r} that torch can use here; leave `device` out for the CPU"
        raise UsageError(line, "device") from None


def has_bf16(device: str) -> bool:
    """Whether a type of device multiplies in bfloat16 itself; a CPU that emulates it takes five times as long."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()


def fast_autocast(device: str) -> torch.autocast:
    """bfloat16 on a type of device that has it, and no change of precision elsewhere."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=has_bf16(device))
