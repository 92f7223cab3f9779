"""Which features of a UNet the grounding head reads, and how one forward pass gives them.

The released program reads 25 tensors of Stable Diffusion 1.5's UNet and sorts them by their absolute size.
Here they are chosen by level, so that any `UNet2DConditionModel` made of plain and cross-attention blocks works,
with any number of levels and of layers a block; for Stable Diffusion 1.5 the choice is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from grounded_diffusion.errors import CheckpointError

DOWN_BLOCKS = {"DownBlock2D": "resnets", "CrossAttnDownBlock2D": "attentions"}
UP_BLOCKS = {"UpBlock2D": "resnets", "CrossAttnUpBlock2D": "attentions"}


@dataclass(frozen=True, slots=True)
class Tap:
    """One module whose output is read.

    Attributes:
        module: its name, as `UNet2DConditionModel.get_submodule` takes it.
        channels: channels C of its output [N,C,h,w], before guidance doubles them.
    """

    module: str
    channels: int


def level_taps(config: Mapping[str, Any]) -> tuple[tuple[Tap, ...], ...]:
    """The taps of every level, lowest resolution first, in the order in which the head concatenates them.

    A level holds what enters it on the way down, its down layers, what enters it on the way up (at the lowest
    level, the middle block) and its up layers. Where an up block ends in an upsampler its last layer is left out:
    the released program runs the two as one, and the upsampler's output stands for both, one level higher.

    Args:
        config: the UNet's configuration.

    Raises:
        CheckpointError: the UNet has block types the head cannot read.
    """
    widths, levels = config["block_out_channels"], len(config["block_out_channels"])
    down, up = config["down_block_types"], tuple(reversed(config["up_block_types"]))
    layers = config["layers_per_block"]
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    unknown = [kind for kind in down if kind not in DOWN_BLOCKS] + [kind for kind in up if kind not in UP_BLOCKS]
    if unknown or config.get("mid_block_type") is None:
        what = ", ".join(dict.fromkeys(unknown)) or "no middle block"
        known = ", ".join([*DOWN_BLOCKS, *UP_BLOCKS])
        raise CheckpointError(f"the UNet has {what}; the grounding head reads UNets of a middle block and {known}")
    result = []
    for level in reversed(range(levels)):  # 0 is the highest resolution
        lowest, width, block = level == levels - 1, widths[level], levels - 1 - level
        taps = [Tap(f"down_blocks.{level - 1}.downsamplers.0", widths[level - 1]) if level else Tap("conv_in", width)]
        taps += [Tap(f"down_blocks.{level}.{DOWN_BLOCKS[down[level]]}.{i}", width) for i in range(layers[level])]
        taps += [Tap("mid_block", width) if lowest else Tap(f"up_blocks.{block - 1}.upsamplers.0", widths[level + 1])]
        kept = layers[level] + (0 if level else 1)
        taps += [Tap(f"up_blocks.{block}.{UP_BLOCKS[up[level]]}.{i}", width) for i in range(kept)]
        result.append(tuple(taps))
    return tuple(result)


def pair_guidance(feature: torch.Tensor) -> torch.Tensor:
    """[2B,C,h,w] in the order [unconditional x B; conditional x B] -> [B,2C,h,w], unconditional channels first.

    Image b gets rows b and B + b. (The released code's reshape does so only for B = 1 and mixes images above.)
    """
    return torch.cat(feature.chunk(2), dim=1)


def paired(levels: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Features [2B,C,h,w] of every level's taps -> one tensor [B,2 sum(C),h,w] a level, in float32."""
    return [torch.cat([pair_guidance(tap) for tap in level], dim=1).float() for level in levels]


class ModuleOutputs:
    """Keeps what some modules gave in a network's latest forward pass, while it is entered.

    Args:
        network: left as it was when the context ends.
        modules: names of its submodules; of one that gives a tuple, the first of it is kept.
    """

    def __init__(self, network: torch.nn.Module, modules: Iterable[str]):
        self._network, self._modules = network, tuple(dict.fromkeys(modules))
        self._outputs: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name in self._modules:
            self._handles.append(self._network.get_submodule(name).register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, name: str):
        def hook(_module, _inputs, output):
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook


class Taps(ModuleOutputs):
    """Captures the tapped features of a UNet's forward passes while it is entered.

    >>> with Taps(unet) as taps:
    ...     output = unet(latents, timestep, context).sample  # batch [unconditional x B; conditional x B]
    ... features = taps.features()  # what GroundingHead takes

    Only the latest forward pass is kept. The UNet is left as it was when the context ends.

    Args:
        unet: a diffusers UNet2DConditionModel.
        more: names of modules to keep beside the tapped ones.

    Attributes:
        levels: the taps of every level, lowest resolution first.
    """

    def __init__(self, unet: torch.nn.Module, more: Iterable[str] = ()):
        self.levels = level_taps(unet.config)
        super().__init__(unet, (*(tap.module for level in self.levels for tap in level), *more))

    def raw(self) -> list[list[torch.Tensor]]:
        """Features [2B,C,h,w] of every level's taps, lowest resolution first; what FoldedHead takes."""
        return [[self._outputs[tap.module] for tap in level] for level in self.levels]

    def features(self) -> list[torch.Tensor]:
        """One tensor [B,2 sum(C),h,w] a level, lowest resolution first, in float32; what GroundingHead takes."""
        return paired(self.raw())
