"""LoRA files added to a model's weights once and for all: W + scale * alpha / rank * up @ down (Hu et al. 2021).

Both ways of naming are read: diffusers' and PEFT's ("unet.down_blocks.0....lora_A.weight"), and kohya's
("lora_unet_down_blocks_0_..._to_q.lora_down.weight"), also with the original layout's blocks, as SDXL's files have.
Every tensor must find its place: a file for another family changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.training.generator.single_file import read_tensors

# prefix in a file -> part of the model
PREFIXES = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "unet.": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
}  # fmt: skip
DOWN, UP = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_A.default.weight"), (
    "lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_B.default.weight",
)  # fmt: skip
ALPHA = "alpha"
LISTED = 4
Pair = dict[str, torch.Tensor]


def pairs(path: str | Path, state: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """Tensors grouped by the layer they change: name -> "down", "up" and perhaps "alpha". Raises CheckpointError."""
    kinds = [
        (suffix, kind) for kind, suffixes in (("down", DOWN), ("up", UP), ("alpha", (ALPHA,))) for suffix in suffixes
    ]
    found: dict[str, Pair] = {}
    other = []
    for key, value in state.items():
        suffix, kind = next(((s, k) for s, k in kinds if key.endswith(f".{s}")), (None, None))
        if suffix is None:
            other.append(key)
        else:
            found.setdefault(key[: -len(suffix) - 1], {})[kind] = value
    if not found or other or any({"down", "up"} - pair.keys() for pair in found.values()):
        what = f"has tensors such as {other[0]}" if other else "lacks the half of a pair" if found else "has no pairs"
        raise CheckpointError(f"{path} is not a LoRA of plain pairs, which alone are read: it {what}")
    return found


def layers_by_name(parts: Mapping[str, Any]) -> dict[tuple[str, str], nn.Module]:
    """(part, name without its dots and underscores) -> layer with a weight."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, module in parts[part].named_modules() if parts.get(part) is not None else ():
            if isinstance(module, nn.Linear | nn.Conv2d):
                found[part, plain(name)] = module
    return found


def plain(name: str) -> str:
    """A layer's name as all ways of writing it have in common."""
    name = re.sub(r"^(text_model|base_model\.model|model)[._]", "", name)
    name = re.sub(r"[._](processor|default)\b", "", name).replace("to_out_lora", "to_out.0").replace("_lora", "")
    return re.sub(r"[._]", "", name)


def original_blocks(parts: Mapping[str, Any]) -> dict[str, str]:
    """Blocks of a UNet in the original layout, in kohya's spelling, -> in diffusers'."""
    config = parts["unet"].config
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    names = {"middle_block_0_": "mid_block_resnets_0_", "middle_block_1_": "mid_block_attentions_0_"}
    names |= {"middle_block_2_": "mid_block_resnets_1_", "input_blocks_0_0_": "conv_in_"}
    for level in range(levels):
        for layer in range(layers):
            at = 1 + level * (layers + 1) + layer
            names[f"input_blocks_{at}_0_"] = f"down_blocks_{level}_resnets_{layer}_"
            names[f"input_blocks_{at}_1_"] = f"down_blocks_{level}_attentions_{layer}_"
        names[f"input_blocks_{(level + 1) * (layers + 1)}_0_op_"] = f"down_blocks_{level}_downsamplers_0_conv_"
        for layer in range(layers + 1):
            at = level * (layers + 1) + layer
            names[f"output_blocks_{at}_0_"] = f"up_blocks_{level}_resnets_{layer}_"
            names[f"output_blocks_{at}_1_"] = f"up_blocks_{level}_attentions_{layer}_"
        for place in (1, 2):
            names[f"output_blocks_{level * (layers + 1) + layers}_{place}_conv_"] = (
                f"up_blocks_{level}_upsamplers_0_conv_"
            )
    return names


RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def in_diffusers_names(name: str, blocks: Mapping[str, str]) -> str:
    """The rest of a kohya name, its blocks as diffusers has them."""
    start = max((key for key in blocks if f"{name}_".startswith(key)), key=len, default=None)
    if start is None:
        return name
    name = blocks[start] + name[len(start) :]
    for old, new in RESNET.items():
        name = name.replace(old, new)
    return name.rstrip("_")


@torch.no_grad()
def fuse(path: str | Path, scale: float, parts: Mapping[str, Any]) -> None:
    """Add a LoRA to the weights of a model's parts, in place.

    Raises:
        CheckpointError: not a LoRA, or one for another model: the layers that do not match are named.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no LoRA at {path}")
    found, layers = pairs(path, read_tensors(path)), layers_by_name(parts)
    blocks, places, lost = original_blocks(parts), {}, []
    for name, pair in found.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        part, rest = PREFIXES.get(prefix, "unet"), name[len(prefix) :]
        rest = in_diffusers_names(rest, blocks) if prefix == "lora_unet_" else rest
        layer = layers.get((part, plain(rest)))
        if layer is None or not fits(layer, pair):
            lost.append(name)
        places[name] = layer
    if lost:
        shown = ", ".join(lost[:LISTED]) + (f" and {len(lost) - LISTED} more" if len(lost) > LISTED else "")
        raise CheckpointError(
            f"{path} is a LoRA for another model: {len(lost)} of its {len(found)} layers match none ({shown})"
        )
    for name, layer in places.items():
        down, up = found[name]["down"].float(), found[name]["up"].float()
        alpha = float(found[name].get("alpha", len(down)))
        layer.weight += scale * alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(layer.weight)


def said_of_runs(path: str | Path) -> tuple[dict[str, Any], list[int]]:
    """How a LoRA wants its model to be run, where its file says so, as those of gd-train distill do.

    Returns:
        of sampler, steps and guidance_scale what it says; and the timesteps of a schedule that it gives whole, or none.

    Raises:
        CheckpointError: it says something that cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        return {}, []
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    if not {"sampler", "timesteps", "guidance_scale"} <= told.keys():
        return {}, []
    try:
        timesteps = [int(part) for part in told["timesteps"].split(",")]
        scale = float(told["guidance_scale"])
    except ValueError as error:
        raise CheckpointError(f"{path} says how to run it in a way that cannot be read ({error})") from None
    return {"sampler": told["sampler"], "steps": len(timesteps), "guidance_scale": scale}, timesteps


def fits(layer: nn.Module, pair: Pair) -> bool:
    """Whether the product of a pair has a layer's shape."""
    down, up = pair["down"], pair["up"]
    return up[0].numel() == len(down) and (len(up), down[0].numel()) == tuple(layer.weight.flatten(1).shape)
