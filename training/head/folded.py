"""The grounding head as it is run and exported: the same function with its constants folded and its sums rearranged.

Three exact identities (each tested against the plain form):
1. A 1x1 convolution over concatenated features is the sum of 1x1 convolutions, one for every tap and half of guidance,
   and it commutes with bilinear upsampling. So the concatenation, 17 million values at 512x512, is never stored.
2. The dot product with the embeddings commutes with bilinear upsampling: `upsample_logits` comes last.
3. Spectral norm is a constant, and batch norm with stored statistics is an affine map.
The paper's variant adds a fourth: upsampling before unfolding is a convolution at the latent's resolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.layers import BATCH_NORM_EPS, MixConv, resize


class FoldedReduce(nn.Module):
    """One level's 1x1 convolution, applied tap by tap: features [2B,C,h,w] -> [B,reduced,h,w]."""

    def __init__(self, weight: torch.Tensor, tap_channels: Sequence[int]):
        """weight [reduced,2 sum(C),1,1]; its columns are, tap by tap, the unconditional and the conditional half."""
        super().__init__()
        columns = weight.detach().split([c for c in tap_channels for _ in range(2)], dim=1)
        self.weights = nn.ParameterList(nn.Parameter(part.clone(), requires_grad=False) for part in columns)

    def forward(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        batch = taps[0].shape[0] // 2
        halves = [half for tap in taps for half in (tap[:batch], tap[batch:])]  # [B,C,h,w] each
        terms = [F.conv2d(half, weight) for half, weight in zip(halves, self.weights, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


class FoldedMix(nn.Module):
    """MixConv with W / sigma for a weight and, with stored statistics, batch norm as an affine map."""

    def __init__(self, mix: MixConv):
        super().__init__()
        self.per_image = mix.statistics == "per_image"
        weights = [conv.normalised_weight().detach().clone() for conv in (mix.conv1, mix.conv2)]
        biases = [conv.bias.detach().clone() for conv in (mix.conv1, mix.conv2)]
        if not self.per_image:
            scale = [torch.rsqrt(getattr(mix, f"stored_var{i}") + BATCH_NORM_EPS) for i in (1, 2)]
            self.register_buffer("scale", scale[0][:, None, None])
            self.register_buffer("shift", (-mix.stored_mean1 * scale[0])[:, None, None])
            weights[0] = weights[0] * scale[1][:, None, None, None]
            biases[0] = (biases[0] - mix.stored_mean2) * scale[1]
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)
        self.biases = nn.ParameterList(nn.Parameter(bias, requires_grad=False) for bias in biases)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """Each channel of each image by its own mean and biased variance."""
        x = x - x.mean(dim=(2, 3), keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=(2, 3), keepdim=True) + BATCH_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self._norm(x) if self.per_image else x * self.scale + self.shift)
        y = F.conv2d(h, self.weights[0], self.biases[0], padding=1)
        y = F.relu(self._norm(y) if self.per_image else y)
        return F.conv2d(y, self.weights[1], self.biases[1], padding=1) + h


def interpolation_taps(scale: int, patch: int) -> torch.Tensor:
    """Weights [scale/patch, patch, 3] of a cell's left neighbour, itself and its right neighbour.

    Pixel i of a cell that is upsampled bilinearly by `scale`, corners not aligned, lies (i + 0.5) / scale - 0.5
    cells from the cell's centre. Pixels come in groups of `patch`.
    """
    offset = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    left, right = (-offset).clamp(min=0), offset.clamp(min=0)
    return torch.stack([left, 1 - left - right, right], 1).view(scale // patch, patch, 3)


class FoldedTokens(nn.Module):
    """Fused map [B,D,h',w'] -> visual tokens [B,T,E] by one convolution, whichever the variant.

    In the paper's, every cell gives (scale/patch)^2 tokens, each a linear function of the cell and its neighbours;
    past the border the edge repeats, as it does in bilinear upsampling.
    """

    def __init__(self, head: GroundingHead):
        super().__init__()
        cfg = head.config
        kernel = head.to_k.weight.detach().unflatten(1, (cfg.fused_channels, cfg.patch, cfg.patch))
        self.stride, self.phases, self.neighbours = cfg.patch, 1, cfg.variant == "paper"
        if self.neighbours:
            if cfg.image_scale % cfg.patch:
                raise UsageError(f"the paper's head needs patch {cfg.patch} to divide image_scale {cfg.image_scale}")
            taps = interpolation_taps(cfg.image_scale, cfg.patch)
            kernel = torch.einsum("edij,aiy,bjx->eabdyx", kernel.double(), taps, taps).float()
            kernel, self.stride, self.phases = kernel.flatten(0, 2), 1, cfg.image_scale // cfg.patch
        self.kernel = nn.Parameter(kernel.contiguous(), requires_grad=False)

    def forward(self, fused: torch.Tensor) -> torch.Tensor:
        if not self.neighbours:
            return F.conv2d(fused, self.kernel, stride=self.stride).flatten(2).transpose(1, 2)
        tokens = F.conv2d(F.pad(fused, (1, 1, 1, 1), mode="replicate"), self.kernel)  # [B,E phases^2,h',w']
        # The decoder attends to tokens as to a set, so their order is free.
        return tokens.unflatten(1, (-1, self.phases**2)).flatten(2).transpose(1, 2)


class FoldedHead(nn.Module):
    """A grounding head for inference: raw taps and object queries -> mask logits.

    Args:
        head: the trained head; it is copied, never changed.
    """

    def __init__(self, head: GroundingHead):
        super().__init__()
        head = copy.deepcopy(head).eval()
        self.config = head.config
        names = head.config.level_names
        self.reduce = nn.ModuleList(
            FoldedReduce(getattr(head, f"{name}_feature_conv")[0].weight, channels)
            for name, channels in zip(names, head.config.tap_channels, strict=True)
        )
        self.mix = nn.ModuleList(FoldedMix(getattr(head, f"{name}_feature_mix_conv")) for name in names[1:])
        self.tokens = FoldedTokens(head)
        self.to_q, self.transfromer_decoder, self.mlp = head.to_q, head.transfromer_decoder, head.mlp
        self.detail, self.evidence = head.detail, head.evidence

    answer = GroundingHead.answer  # on the same modules, under the same names

    def forward(
        self, taps: Sequence[Sequence[torch.Tensor]], queries: torch.Tensor, query_valid: torch.Tensor
    ) -> torch.Tensor:
        """`taps`: what `raw` of the head's taps gives: features [2B,C,h,w] of every level, and attention where it is
        read; the rest as GroundingHead's."""
        return self.with_states(taps, queries, query_valid)[0]

    def with_states(
        self, taps: Sequence[Sequence[torch.Tensor]], queries: torch.Tensor, query_valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the decoder's states of the objects."""
        levels, attention = taps[: len(self.reduce)], taps[len(self.reduce) :]
        top, fused = len(levels) - 1, None
        for i, level in enumerate(levels):
            reduced = self.reduce[i](level)
            if i < top:
                reduced = resize(reduced, levels[i + 1][0].shape[2:])
            fused = reduced if fused is None else self.mix[i - 1](torch.cat([fused, reduced], dim=1))
            if i < top - 1:
                fused = resize(fused, levels[i + 2][0].shape[2:])
        return self.answer(fused, queries, query_valid, *attention)


@singledispatch
def fold(head: nn.Module) -> nn.Module:
    """A head's inference form, in evaluation mode: it takes what the `raw` of the head's taps gives."""
    raise TypeError(f"{type(head).__name__} is no grounding head")


@fold.register
def _(head: GroundingHead) -> FoldedHead:
    return FoldedHead(head).eval().requires_grad_(False)
