"""Trainable low-rank changes of a frozen model's weights, in the form of a LoRA file (Hu et al. 2021).

A change is a parametrisation of a layer's weight, so whatever uses the model runs with it as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils import parametrize

from grounded_diffusion.files import replace_file


class LowRank(nn.Module):
    """weight [out,...] -> weight + up @ down, with `down` [rank,in] and `up` [out,rank]; at first no change."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        out, inner = weight.flatten(1).shape
        rank = min(rank, out, inner)
        self.down = nn.Parameter(torch.randn(rank, inner, device=weight.device) / inner**0.5)
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # small numbers on large ones
            return weight + (self.up @ self.down).view_as(weight)


def add_changes(model: nn.Module, rank: int) -> nn.ModuleDict:
    """Give every linear layer and convolution of a frozen model a change; returns them, by the layer's name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    changes = {}
    for name, layer in layers.items():
        changes[name.replace(".", "/")] = change = LowRank(layer.weight, rank)
        parametrize.register_parametrization(layer, "weight", change)
    return nn.ModuleDict(changes)


def save_changes(changes: nn.ModuleDict, path: Path, about: dict[str, str]) -> None:
    """Write a LoRA file of the UNet in PEFT's names, in half precision; `about` goes into its metadata."""
    tensors = {}
    for name, change in changes.items():
        layer = f"unet.{name.replace('/', '.')}"
        tensors[f"{layer}.lora_A.weight"] = change.down.detach().to("cpu", torch.float16).contiguous()
        tensors[f"{layer}.lora_B.weight"] = change.up.detach().to("cpu", torch.float16).contiguous()
    replace_file(path, save(tensors, metadata={"format": "pt", **about}))
