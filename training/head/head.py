"""The grounding head: reads a UNet's features at one denoising step and draws a mask for every object.

Li et al., "Open-vocabulary Object Segmentation with Diffusion Models" (ICCV 2023), section 3.3.2, in two variants:

- `released`: what the published program computes. Features are fused at the latent's resolution, the fused map is
  unfolded into tokens there (256 at 512x512), and only the logits are brought to the image's size.
- `paper`: the fused map is upsampled to the image's size before it is unfolded (16,384 tokens at 512x512). The paper
  does not say how; here it is bilinear, with the released weights' shapes, so that one state dict fits both.

Module names, their spelling included, are those of the released state dict.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from grounded_diffusion.engine.checks import listing
from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.head.layers import Decoder, Detail, MixConv, Mlp, resize
from grounded_diffusion.training.head.queried import Evidence, Layers, QueriedTaps, read_layers
from grounded_diffusion.training.head.taps import Taps, level_taps

MASKED = -3e4  # added to the score of a padded key: its weight underflows to exactly 0, and FP16 can hold it
Attention = Mapping[str, torch.Tensor]  # image queries and what tells their resolution, by module
HIGHEST_CHANNELS = 128  # reduced channels at the highest level; each lower level has half (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Sizes and form of a grounding head. Levels are counted from the lowest resolution up.

    Attributes:
        tap_channels: channels of every tapped feature, level by level, before guidance doubles them.
        variant: "released" or "paper".
        reduced_channels: channels each level is reduced to; () halves 128 from level to level downwards.
        embed_dim: width of the transformer decoder.
        heads: attention heads.
        layers: decoder layers.
        ffn_dim: hidden width of the feed-forward networks.
        patch: cells of the fused map (pixels, in the paper's variant) to a visual token, along each side.
        text_dim: width of the text embedding the queries come from.
        statistics: "per_image" normalises by each image's own statistics, as the released program does;
            "stored" by running averages once the head is in evaluation mode.
        image_scale: pixels per latent cell; only the paper's variant uses it.
        detail: mask logits have this many times as many cells along each side as the fused map; 1 is the paper's.
        attention: layers of the UNet's cross-attention that objects' queries are asked for in, see head/queried.py;
            () reads none, as the paper.
        words: of the query's template before the name, with the begin token; where attention is read.
    """

    tap_channels: tuple[tuple[int, ...], ...]
    variant: str = "released"
    reduced_channels: tuple[int, ...] = ()
    embed_dim: int = 512
    heads: int = 8
    layers: int = 3
    ffn_dim: int = 2048
    patch: int = 4
    text_dim: int = 768
    statistics: str = "per_image"
    image_scale: int = 8
    detail: int = 1
    attention: Layers = ()
    words: int = 0

    def __post_init__(self):
        levels = len(self.tap_channels)
        reduced = self.reduced_channels or [max(1, HIGHEST_CHANNELS >> (levels - 1 - i)) for i in range(levels)]
        object.__setattr__(self, "reduced_channels", tuple(reduced))
        object.__setattr__(self, "tap_channels", tuple(tuple(level) for level in self.tap_channels))
        if levels < 2 or len(reduced) != levels:
            raise UsageError(f"the head has {levels} levels and {len(reduced)} reduced_channels; they must agree, >= 2")
        if self.variant not in ("released", "paper"):
            raise UsageError(f"head variant {self.variant!r} is unknown; choose released or paper")
        if self.statistics not in ("per_image", "stored"):
            raise UsageError(f"head statistics {self.statistics!r} are unknown; choose per_image or stored")
        for name in ("embed_dim", "heads", "layers", "ffn_dim", "patch", "text_dim", "image_scale", "detail"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"head {name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        object.__setattr__(self, "attention", read_layers(self.attention))
        if bool(self.attention) != (self.words > 0):
            raise UsageError("a head that reads attention has words of a template to compare names with, others none")
        if self.embed_dim % self.heads:
            raise UsageError(f"head embed_dim {self.embed_dim} is not divisible by {self.heads} heads")

    @classmethod
    def for_unet(cls, unet_config: Mapping[str, Any], **overrides: Any) -> HeadConfig:
        """The head that fits a UNet; `overrides` are this class's fields. Unknown names raise UsageError."""
        if unknown := sorted(overrides.keys() - {f.name for f in fields(cls)}):
            raise UsageError(
                f"unknown head option {', '.join(unknown)}; known: {', '.join(f.name for f in fields(cls))}"
            )
        taps = tuple(tuple(tap.channels for tap in level) for level in level_taps(unet_config))
        return cls(**{"tap_channels": taps, "text_dim": unet_config["cross_attention_dim"]} | overrides)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every level's features, both halves of guidance."""
        return tuple(2 * sum(level) for level in self.tap_channels)

    @property
    def fused_channels(self) -> int:
        """Channels D of the fused map: those of all levels together."""
        return sum(self.reduced_channels)

    @property
    def level_names(self) -> tuple[str, ...]:
        """The released names of the levels: low, mid, high, highest; nets of fewer levels have no mid, then no high."""
        levels = len(self.tap_channels)
        middle = [f"mid{i}" for i in range(levels - 3, 1, -1)] + ["mid"] * (levels > 3) + ["high"] * (levels > 2)
        return ("low", *middle, "highest")


def upsample_logits(mask_logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Mask logits [B,O,h',w'] -> [B,O,H,W].

    Bilinear upsampling commutes with the dot product over channels (Eq. 6), so this equals the product of
    the embeddings with the upsampled features. The mask is where the result is above 0 (sigmoid above 0.5).
    """
    return resize(mask_logits, size)


class GroundingHead(nn.Module):
    """UNet features and object queries -> mask logits.

    Args:
        config: sizes and form.

    In training mode the spectral norm's `u0` and the stored statistics move; in evaluation mode nothing does.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        total = 0
        for name, channels, reduced in zip(config.level_names, config.channels, config.reduced_channels, strict=True):
            self.add_module(f"{name}_feature_conv", nn.Sequential(nn.Conv2d(channels, reduced, 1, bias=False)))
            total += reduced
            if name != "low":
                self.add_module(f"{name}_feature_mix_conv", MixConv(total, config.statistics))
        self.transfromer_decoder = Decoder(
            config.embed_dim, config.heads, config.layers, config.ffn_dim
        )  # the released spelling
        self.mlp = Mlp(config.embed_dim, config.fused_channels)
        self.detail = Detail(config.embed_dim, config.fused_channels, config.detail) if config.detail > 1 else None
        self.evidence = (
            Evidence(config.attention, config.words, config.text_dim, config.embed_dim, config.fused_channels)
            if config.attention else None
        )  # fmt: skip
        self.to_k = nn.Linear(config.fused_channels * config.patch**2, config.embed_dim, bias=False)
        self.to_q = nn.Linear(config.text_dim, config.embed_dim, bias=False)

    @property
    def latent_multiple(self) -> int:
        """h and w of the latents must be multiples of this."""
        return self.config.patch if self.config.variant == "released" else 1

    def taps(self, unet: nn.Module) -> Taps:
        """What captures this head's inputs."""
        return QueriedTaps(unet, self.config.attention) if self.config.attention else Taps(unet)

    def about(self) -> dict[str, Any]:
        """What a bundle's manifest says of the head."""
        cfg = self.config
        sizes = dict(reduced_channels=list(cfg.reduced_channels), embed_dim=cfg.embed_dim, layers=cfg.layers)
        grid = dict(patch=cfg.patch, detail=cfg.detail, attention=[name for name, _, _ in cfg.attention])
        return dict(variant=cfg.variant, statistics=cfg.statistics, **sizes, **grid)

    def encode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The visual encoder: features [B,2 sum(C),h,w] a level, lowest first -> fused map F [B,D,h',w'].

        Every level is brought to the size of the level above before its 1x1 convolution, as the released code does.
        """
        top, fused = len(features) - 1, None
        for i, (name, feature) in enumerate(zip(self.config.level_names, features, strict=True)):
            if i < top:
                feature = resize(feature, features[i + 1].shape[2:])
            reduced = getattr(self, f"{name}_feature_conv")(feature)
            if fused is None:
                fused = reduced
            else:
                fused = getattr(self, f"{name}_feature_mix_conv")(torch.cat([fused, reduced], dim=1))
            if i < top - 1:
                fused = resize(fused, features[i + 2].shape[2:])
        return fused

    def tokens(self, fused: torch.Tensor) -> torch.Tensor:
        """Fused map [B,D,h',w'] -> visual tokens [B,T,E], T = h' w' / patch^2 (of the image's H W for the paper)."""
        cfg = self.config
        if cfg.variant == "paper":
            fused = resize(fused, [side * cfg.image_scale for side in fused.shape[2:]])
        # Unfolding p x p patches and projecting them is a p x p convolution with stride p.
        kernel = self.to_k.weight.unflatten(1, (cfg.fused_channels, cfg.patch, cfg.patch))
        return F.conv2d(fused, kernel, stride=cfg.patch).flatten(2).transpose(1, 2)

    def answer(
        self, fused: torch.Tensor, queries: torch.Tensor, query_valid: torch.Tensor, *attention: Attention
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits, and states [B,O,E], of queries [B,O,text_dim] on a fused map [B,D,h',w']."""
        queries = queries.masked_fill(~query_valid[..., None], 0)
        mask = torch.where(query_valid, 0.0, MASKED)[:, None, None]  # [B,1,1,O]
        objects = self.to_q(queries)  # [B,O,E]
        if self.evidence is not None:
            told, looks = self.evidence(*attention, queries, fused)
            objects = objects + looks
        states = self.transfromer_decoder(objects, self.tokens(fused), mask)
        logits = (self.mlp(states) @ fused.flatten(2)).unflatten(2, fused.shape[2:])
        if self.evidence is not None:
            logits = logits + told
        if self.detail is not None:
            fine = self.detail(fused, states)
            logits = resize(logits, fine.shape[2:]) + fine
        return logits, states

    def with_states(
        self, features: Sequence[torch.Tensor], queries: torch.Tensor, query_valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` gives, and the decoder's states of the objects [B,O,E], which presence reads."""
        levels = len(self.config.tap_channels)
        return self.answer(self.encode(features[:levels]), queries, query_valid, *features[levels:])

    def forward(
        self, features: Sequence[torch.Tensor], queries: torch.Tensor, query_valid: torch.Tensor
    ) -> torch.Tensor:
        """Mask logits at `detail` times the fused map's resolution; `upsample_logits` brings them to the image's.

        Args:
            features: one tensor [B,2 sum(C),h,w] a level, lowest resolution first, and last a mapping of attention
                where it is read: as `features` of the head's taps gives them.
            queries: [B,O,text_dim], one row an object.
            query_valid: [B,O] bool; rows that are False are padding, and influence no other row.

        Returns:
            [B,O,h',w'] logits (Eq. 6); those of padded rows mean nothing.
        """
        return self.with_states(features, queries, query_valid)[0]


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file. Code in the pickle is refused, not run. Raises CheckpointError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the grounding module {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not a plain state dict: its pickle is damaged or holds code, which is never run; "
            "save the module's state_dict() and nothing else"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        detail = (str(error).splitlines() or ["it ends early"])[0][:100]
        raise CheckpointError(f"{path} is not a torch checkpoint ({detail})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors; save the grounding module's state_dict()")
    return state


def load_state(head: GroundingHead, state: Mapping[str, torch.Tensor], where: str | Path) -> None:
    """Load a state dict strictly; CheckpointError counts the keys that are missing, unknown or of another shape, and
    names the first ones."""
    expected = head.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    wrong = [f"{len(shapes)} of other shapes: {listing(shapes)}"] if shapes else []
    for label, keys in (("missing", expected.keys() - state.keys()), ("unknown", state.keys() - expected.keys())):
        if keys:
            wrong.append(f"{len(keys)} {label} keys: {listing(keys)}")
    if wrong:
        raise CheckpointError(f"{where} does not fit this UNet's {head.config.variant} head: {'; '.join(wrong)}")
    head.load_state_dict({key: value.float() for key, value in state.items()})


def load_released(path: str | Path, config: HeadConfig) -> GroundingHead:
    """A head in evaluation mode with the weights of a released `grounding_module.pth`, loaded strictly.

    Raises:
        CheckpointError: unreadable, code in the pickle, or keys that are missing, unknown or of another shape.
    """
    head = GroundingHead(config)
    load_state(head, read_state_dict(path), path)
    return head.eval().requires_grad_(False)
