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
