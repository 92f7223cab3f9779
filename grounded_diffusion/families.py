"""Model families: what a Stable Diffusion is, besides the sizes that its own tensors tell.

A file of weights says how wide and how deep a network is, but not what the network predicts, how its attention is cut
into heads, how its latents are scaled or how its timesteps are spaced. That is here, in one table; a new family is one
entry. Sources are the configurations that the models' makers publish beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from grounded_diffusion.errors import UsageError

# Noise of training, the same in all of them (Rombach et al. 2022, in the configurations of the released models).
NOISE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
    clip_sample=False, set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TextTower:
    """One text encoder.

    Attributes:
        prefix: of its tensors in a single file.
        activation: of its feed-forward networks.
        open_clip: whether a single file has it in OpenCLIP's layout, with one layer more than is run.
        penultimate: whether the hidden state before the last layer is read, without the final norm.
        pooled: whether the projected state at the end token is read too.
        pad: the token that fills up a short text; None for the end token.
    """

    prefix: str
    activation: str
    open_clip: bool = False
    penultimate: bool = False
    pooled: bool = False
    pad: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of model.

    Attributes:
        title: what people call it.
        image_size: side in pixels that it was trained at.
        text: its text encoders, in the order in which their states are joined.
        heads: attention heads of every layer; None for heads of 64 channels.
        prediction: "epsilon" or "v_prediction".
        scheduler: diffusers' class, and what its configuration has besides NOISE.
        scaling_factor: of the latents.
        fp32_decoder: whether its autoencoder overflows in FP16.
        steps, guidance_scale: what the models' cards say; a scale of 1 is no guidance.
        zero_negative: whether an empty negative prompt is a context of zeros.
    """

    title: str
    image_size: int
    text: tuple[TextTower, ...]
    heads: int | None
    prediction: str = "epsilon"
    scheduler: tuple[str, Mapping[str, Any]] = ("DDIMScheduler", MappingProxyType({}))
    scaling_factor: float = 0.18215
    zero_negative: bool = False
    fp32_decoder: bool = False
    steps: int = 50
    guidance_scale: float = 7.5

    @property
    def layout(self) -> tuple[str, ...]:
        """What tells families apart in a single file: the prefixes of their text encoders."""
        return tuple(tower.prefix for tower in self.text)


CLIP_L = TextTower("cond_stage_model.transformer.", "quick_gelu")
OPEN_CLIP_H = TextTower("cond_stage_model.model.", "gelu", open_clip=True, pad="!")

CLIP_L_XL = TextTower("conditioner.embedders.0.transformer.", "quick_gelu", penultimate=True)
OPEN_CLIP_G = TextTower(
    "conditioner.embedders.1.model.", "gelu", open_clip=True, penultimate=True, pooled=True, pad="!"
)
# A run's own names of diffusers' schedulers.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "LCMScheduler": "lcm",
}
TRAILING = ("EulerDiscreteScheduler", MappingProxyType(dict(timestep_spacing="trailing")))
LCM = ("LCMScheduler", MappingProxyType({}))
XL: dict[str, Any] = dict(heads=None, scaling_factor=0.13025, zero_negative=True, fp32_decoder=True)

FAMILIES: dict[str, Family] = {
    "sd1": Family("Stable Diffusion 1.x", 512, (CLIP_L,), heads=8),
    "sd2": Family("Stable Diffusion 2.x at 768 pixels", 768, (OPEN_CLIP_H,), heads=None, prediction="v_prediction"),
    "sd2-base": Family("Stable Diffusion 2.x at 512 pixels", 512, (OPEN_CLIP_H,), heads=None),
    "sd-turbo": Family(
        "SD-Turbo", 512, (OPEN_CLIP_H,), heads=None, scheduler=TRAILING, steps=1, guidance_scale=1.0,
    ),
    "lcm": Family("LCM of Stable Diffusion 1.x", 512, (CLIP_L,), heads=8, scheduler=LCM, steps=4, guidance_scale=8.0),
    "sdxl": Family(
        "SDXL", 1024, (CLIP_L_XL, OPEN_CLIP_G), **XL,
        scheduler=("EulerDiscreteScheduler", MappingProxyType(dict(timestep_spacing="leading"))), guidance_scale=5.0,
    ),
    "sdxl-turbo": Family(
        "SDXL-Turbo", 512, (CLIP_L_XL, OPEN_CLIP_G), **XL,
        scheduler=("EulerAncestralDiscreteScheduler", TRAILING[1]), steps=1, guidance_scale=1.0,
    ),
    "sdxl-lcm": Family(
        "LCM of SDXL", 1024, (CLIP_L_XL, OPEN_CLIP_G), **XL, scheduler=LCM, steps=4, guidance_scale=8.0,
    ),
}  # fmt: skip


def family_of(name: str) -> Family:
    """A family by name. Raises UsageError for one that is not in the table."""
    if name not in FAMILIES:
        raise UsageError(f"there is no model family {name!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
