"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib

import torch


def weights_digest(*modules: torch.nn.Module) -> str:
    """SHA-256 of modules' parameters, rounded to half precision: a model and its copy saved in FP16 are the same."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.named_parameters():
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
