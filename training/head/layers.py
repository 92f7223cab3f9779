"""The grounding head's layers. Parameter names are those of the released state dict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

BATCH_NORM_EPS = 1e-4  # the released program's, as is the next
SPECTRAL_NORM_EPS = 1e-4
BATCH_NORM_MOMENTUM = 0.1
DETAIL_CHANNELS = 32


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear resampling of [B,C,h,w], corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class SpectralConv(nn.Module):
    """3x3 convolution [B,C,h,w] -> [B,C,h,w] with weight W / sigma (Miyato et al., 2018).

    sigma comes from one power iteration that starts at `u0`; training mode moves `u0` on and logs sigma in `sv0`.
    """

    def __init__(self, channels: int):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3)
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("u0", torch.randn(1, channels))
        self.register_buffer("sv0", torch.ones(1))

    def normalised_weight(self) -> torch.Tensor:
        """W / sigma, [C,C,3,3]."""
        matrix = self.weight.flatten(1)  # [C,9C]
        with torch.no_grad():
            v = F.normalize(self.u0 @ matrix, eps=SPECTRAL_NORM_EPS)
            u = F.normalize(v @ matrix.T, eps=SPECTRAL_NORM_EPS)
        sigma = (v @ matrix.T @ u.T).squeeze()
        if self.training:
            with torch.no_grad():
                self.u0.copy_(u)
                self.sv0.fill_(sigma)
        return self.weight / sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.normalised_weight()
        return F.conv2d(x, weight, self.bias, padding=1)


class MixConv(nn.Module):
    """Blends two resolutions: out = conv2(ReLU(BN(conv1(h)))) + h with h = ReLU(BN(x)); [B,C,h,w] -> the same.

    The residual is h, not x: the released code's first ReLU works in place. Batch norm has no affine part.
    """

    def __init__(self, channels: int, statistics: str):
        super().__init__()
        self.statistics = statistics
        self.conv1, self.conv2 = SpectralConv(channels), SpectralConv(channels)
        for i in (1, 2):
            self.register_buffer(f"stored_mean{i}", torch.zeros(channels))
            self.register_buffer(f"stored_var{i}", torch.ones(channels))

    def _norm(self, x: torch.Tensor, i: int) -> torch.Tensor:
        mean, var = getattr(self, f"stored_mean{i}"), getattr(self, f"stored_var{i}")
        if self.statistics == "stored":
            return F.batch_norm(x, mean, var, None, None, self.training, BATCH_NORM_MOMENTUM, BATCH_NORM_EPS)
        if self.training:
            with torch.no_grad():
                batch_var, batch_mean = torch.var_mean(x.float(), dim=(0, 2, 3))
                mean.lerp_(batch_mean, BATCH_NORM_MOMENTUM)
                var.lerp_(batch_var, BATCH_NORM_MOMENTUM)
        return F.instance_norm(x, eps=BATCH_NORM_EPS)  # biased variance, as batch norm of one image has

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self._norm(x, 1))
        return self.conv2(F.relu(self._norm(self.conv1(h), 2))) + h


class Attention(nn.Module):
    """Multi-head attention without biases, with the parameter names of nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """query [B,O,E], memory [B,T,E] as key and value, mask added to the scores [B,1,1,T] -> [B,O,E]."""
        weights = self.in_proj_weight.chunk(3)
        q, k, v = (
            F.linear(x, w).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,heads,O or T,E/heads]
            for x, w in zip((query, memory, memory), weights, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm layer: self-attention among the queries, cross-attention to the visual tokens, feed-forward."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn, self.multihead_attn = Attention(dim, heads), Attention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.self_attn(y, y, mask)
        x = x + self.multihead_attn(self.norm2(x), memory)
        return x + self.linear2(F.relu(self.linear1(self.norm3(x))))


class Decoder(nn.Module):
    """Decoder layers without a final norm; queries [B,O,E] and memory [B,T,E] -> [B,O,E]."""

    def __init__(self, dim: int, heads: int, layers: int, ffn_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_dim) for _ in range(layers))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, memory, mask)
        return x


class Detail(nn.Module):
    """Mask logits on a finer grid than the fused map's: what is thinner than a cell.

    Every cell of the fused map says what its scale x scale parts are (it has seen its neighbours already); objects meet
    those parts as they meet the cells.

    Args:
        dim: width E of the objects.
        fused: channels D of the fused map.
        scale: parts of a cell along each side.
    """

    def __init__(self, dim: int, fused: int, scale: int):
        super().__init__()
        self.scale = scale
        self.parts = nn.Conv2d(fused, DETAIL_CHANNELS * scale**2, 1)
        self.blend = nn.Conv2d(DETAIL_CHANNELS, DETAIL_CHANNELS, 3, padding=1)
        self.mlp = Mlp(dim, DETAIL_CHANNELS)

    def forward(self, fused: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """fused [B,D,h',w'], objects [B,O,E] -> [B,O,scale h',scale w']."""
        parts = F.pixel_shuffle(self.parts(F.relu(fused)), self.scale)
        parts = self.blend(F.relu(parts)) + parts
        return (self.mlp(objects) @ parts.flatten(2)).unflatten(2, parts.shape[2:])


class Mlp(nn.Module):
    """Three linear layers with ReLU between; [B,O,E] -> [B,O,D]."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
