"""Checkpoints: a diffusers-format Stable Diffusion directory with a grounding head beside it.

    CHECKPOINT/{model_index.json,unet/,vae/,text_encoder/,tokenizer/,scheduler/}   what diffusers itself loads
    CHECKPOINT/grounding_head/{config.json,model.safetensors}                      what this project adds,
                              presence.safetensors                                 and this where it tells presence
    CHECKPOINT/sampling.json                                                       and how the model is best run

The other forms people have are a plain model (see training/generator/model.py) and the paper's `grounding_module.pth`
for it, or no head at all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from grounded_diffusion.bundle import Manifest
from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.reading import Misfit, Number, decode, read_file
from grounded_diffusion.training.generator.attention import GUIDANCE, NOUNS, attention_head
from grounded_diffusion.training.generator.denoiser import Denoiser
from grounded_diffusion.training.generator.model import PARTS, first_line, load_base, save_base
from grounded_diffusion.training.generator.text import TextTower, template_states
from grounded_diffusion.training.head.attention import CAPTURE_TIMESTEP, AttentionConfig, AttentionHead
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig, load_released, load_state
from grounded_diffusion.training.head.presence import Presence, PresenceConfig
from grounded_diffusion.training.head.queried import layers_of

HEAD = "grounding_head"
PRESENCE = "presence.safetensors"
RELEASED_TIMESTEP = 1  # the last of 50 leading-spaced DDIM steps with steps_offset 1
RELEASED_TEMPLATE = "a photograph of a {}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Stable-Diffusion-format model with its grounding head; modules in float32 and evaluation mode when loaded.

    Attributes:
        unet, vae, text_encoder, tokenizer: as diffusers and transformers have them.
        scheduler: a diffusers scheduler.
        head: the grounding head.
        capture_timestep: training timestep at which the head reads the UNet's features.
        query_template: text whose sub-tokens at "{}" make an object's query.
        names: object names, such as {"seen": [...], "unseen": [...]}; empty where unknown.
        text_encoder_2: of a family with two.
        family: one of FAMILIES.
        presence: says whether an object is there at all; None for a head without it.
        sampling: what the model's runs are to take, instead of what its family and scheduler say; see SAMPLING.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    head: GroundingHead | AttentionHead
    capture_timestep: int = RELEASED_TIMESTEP
    query_template: str = RELEASED_TEMPLATE
    names: dict[str, list[str]] = field(default_factory=dict)
    text_encoder_2: CLIPTextModelWithProjection | None = None
    family: str = "sd1"
    presence: Presence | None = None
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        steps = self.scheduler.config.num_train_timesteps
        if not 0 <= self.capture_timestep < steps:
            raise CheckpointError(f"capture_timestep is {self.capture_timestep}; the scheduler has 0 to {steps - 1}")
        if self.query_template.count("{}") != 1:
            raise CheckpointError(f"query_template {self.query_template!r} must hold {{}} once, for the object's name")

    @property
    def tower(self) -> TextTower:
        """All that makes a context of a text."""
        zero = FAMILIES[self.family].zero_negative
        return TextTower(self.text_encoder, self.text_encoder_2, self.tokenizer.eos_token_id, zero).eval()

    @property
    def denoiser(self) -> Denoiser:
        """The UNet behind one call, whatever its family wants besides the context."""
        return Denoiser(self.unet, self.vae_scale_factor).eval()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w) of the latents the UNet was trained on."""
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)


def with_statistics(checkpoint: Checkpoint, statistics: str) -> Checkpoint:
    """The same checkpoint, its head's batch norm by "per_image" or "stored" statistics."""
    head = GroundingHead(replace(checkpoint.head.config, statistics=statistics))
    head.load_state_dict(checkpoint.head.state_dict())
    return replace(checkpoint, head=head.eval().requires_grad_(False))


@dataclass(frozen=True, slots=True)
class HeadFile:
    """grounding_head/config.json; fields as Checkpoint has them."""

    head: HeadConfig
    capture_timestep: Number = RELEASED_TIMESTEP
    query_template: str = RELEASED_TEMPLATE
    names: dict[str, list[str]] = field(default_factory=dict)
    presence: PresenceConfig | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint directory, its weights in `dtype`; `StableDiffusionPipeline.from_pretrained` loads it too.

    The head's buffers (statistics, spectral norm) stay in float32. The checkpoint's own modules are not changed.
    """
    path = Path(path)
    modules = {name: copy.deepcopy(getattr(checkpoint, name)) for name in PARTS[:3]}
    for parameter in (p for module in modules.values() for p in module.parameters()):
        parameter.data = parameter.data.to("cpu", dtype)
    rest = {name: getattr(checkpoint, name) for name in ("tokenizer", "scheduler", "sampling")}
    save_base(path, modules | rest)
    (path / HEAD).mkdir(exist_ok=True)
    _save_weights(checkpoint.head, path / HEAD / "model.safetensors", dtype)
    about = dict(
        head=asdict(checkpoint.head.config),
        capture_timestep=checkpoint.capture_timestep,
        query_template=checkpoint.query_template,
        names=checkpoint.names,
    )
    if checkpoint.presence is not None:
        about["presence"] = asdict(checkpoint.presence.config)
        _save_weights(checkpoint.presence, path / HEAD / PRESENCE, dtype)
    (path / HEAD / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _save_weights(module: torch.nn.Module, file: Path, dtype: torch.dtype) -> None:
    """A module's parameters in `dtype`, its buffers as they are."""
    weights = {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}
    weights |= {name: value.detach().to("cpu", dtype) for name, value in module.named_parameters()}
    save_file({name: value.contiguous() for name, value in weights.items()}, file)


def _load_presence(folder: Path, config: PresenceConfig) -> Presence:
    """What a head's folder says of presence. Raises CheckpointError."""
    try:
        presence = Presence(config)
        presence.load_state_dict({name: value.float() for name, value in load_file(folder / PRESENCE).items()})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, UsageError) as error:
        raise CheckpointError(f"cannot load {folder / PRESENCE}: {first_line(error)}") from None
    return presence.eval().requires_grad_(False)


def _load_head(folder: Path) -> tuple[GroundingHead, dict[str, Any]]:
    """The head in `folder` and what its configuration says besides."""
    try:
        about = decode(read_file(folder / "config.json"), HeadFile)
        state = load_file(folder / "model.safetensors")
        head = GroundingHead(about.head)
    except (OSError, ValueError, RuntimeError, SafetensorError, UsageError) as error:
        told = error.at(folder / "config.json") if isinstance(error, Misfit) else first_line(error)
        raise CheckpointError(f"cannot load the grounding head {folder}: {told}") from None
    load_state(head, state, folder / "model.safetensors")
    rest = {name: getattr(about, name) for name in ("capture_timestep", "query_template", "names", "presence")}
    return head.eval().requires_grad_(False), rest


def untrained_checkpoint(base: str | Path, capture_timestep: int = RELEASED_TIMESTEP, **model: Any) -> Checkpoint:
    """A base model with a head of random weights, whose masks mean nothing: to make examples with, for a real one.

    Args:
        base, model: what `load_base` takes.

    Raises:
        CheckpointError: as `load_base`, whose further arguments `model` are; a timestep that the model does not have.
    """
    parts = load_base(base, **model)
    torch.manual_seed(0)
    head = GroundingHead(HeadConfig.for_unet(parts["unet"].config)).eval().requires_grad_(False)
    return Checkpoint(**parts, head=head, capture_timestep=capture_timestep)


def load_checkpoint(
    path: str | Path | None,
    base: str | Path | None = None,
    *,
    head: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    **model: Any,
) -> Checkpoint:
    """A checkpoint directory; with `base` the paper's `grounding_module.pth` on a model, or a model without a head.

    Args:
        path: a directory with grounding_head/, a .pth file, or None.
        base: what `load_base` takes; the model that a .pth file belongs to, or one that gets the attention head.
        head: "attention" for the head that needs no training, also where there is a trained one.
        report: told what is going on.
        model: further arguments of `load_base`.

    Raises:
        UsageError: `path` and `base` do not go together.
        CheckpointError: not a checkpoint, keys missing (listed), parts that do not fit, code in a pickle.
    """
    if path is None:
        return with_attention(load_base(base, **model), report=report)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        if base is not None:
            raise UsageError(f"{path} is a whole checkpoint; leave out --base, which goes with a grounding_module.pth")
        if (path / "model_index.json").is_file() and not (path / HEAD).is_dir():
            raise CheckpointError(
                f"{path} has no {HEAD}/; give it as --base, for masks without training or with a "
                "grounding_module.pth as --ckpt"
            )
        parts = load_base(path, **model)
        trained, about = _load_head(path / HEAD)
        expected, own = HeadConfig.for_unet(parts["unet"].config).tap_channels, trained.config
        fits = own.tap_channels == expected and own.text_dim == context_width(parts)
        if not fits or not set(own.attention) <= set(layers_of(parts["unet"])):
            raise CheckpointError(f"the grounding head of {path} was made for another UNet than the one beside it")
        if head == "attention":
            return with_attention(parts, report=report, names=about["names"], query_template=about["query_template"])
        if about["presence"] is not None:
            about["presence"] = _load_presence(path / HEAD, about["presence"])
        return Checkpoint(**parts, head=trained, **about)
    if base is None:
        raise UsageError(f"{path} is only a grounding module; name its Stable Diffusion 1.x model with --base")
    if head == "attention":
        raise UsageError(f"{path} is a trained head; leave out --ckpt for masks without training, or --head attention")
    parts = load_base(base, **model)
    scale = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    config = HeadConfig.for_unet(parts["unet"].config, image_scale=scale)
    return Checkpoint(**parts, head=load_released(path, config))


def as_exported(base: str | Path, manifest: Manifest) -> Checkpoint:
    """The torch model behind a bundle: with a trained head that of the checkpoint `base`, else the attention head that
    the bundle says it has, on the model `base`. Raises CheckpointError.
    """
    if manifest.head.get("variant") != "attention":
        return load_checkpoint(base)
    given = manifest.head | {"layers": tuple(manifest.head["layers"].items())}
    config = AttentionConfig(**given | {"features": tuple(given["features"])})
    bare = Checkpoint(
        **load_base(base), head=None, capture_timestep=manifest.capture_timestep,
        query_template=manifest.query_template, names=manifest.names,
    )  # fmt: skip
    words = template_states(bare.tower, bare.tokenizer, bare.query_template)
    head = AttentionHead(config, bare.unet, words, bare.latent_size)
    return replace(bare, head=head.eval().requires_grad_(False))


def context_width(parts: dict[str, Any]) -> int:
    """Width of the text states that a model's UNet reads."""
    return parts["unet"].config.cross_attention_dim


def with_attention(
    parts: dict[str, Any],
    *,
    names: dict[str, list[str]] | None = None,
    query_template: str = RELEASED_TEMPLATE,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """A model with the head that needs no training; its layers are chosen by what the model draws."""
    names = names or {}
    bare = Checkpoint(**parts, head=None, capture_timestep=CAPTURE_TIMESTEP, query_template=query_template, names=names)
    head = attention_head(
        bare.unet, bare.tower, bare.tokenizer, bare.scheduler, query_template,
        latent_size=bare.latent_size, vae_scale_factor=bare.vae_scale_factor,
        nouns=[name for group in names.values() for name in group] or NOUNS,
        guidance=GUIDANCE if FAMILIES[bare.family].guidance_scale > 1 else 1.0, report=report,
    )  # fmt: skip
    return replace(bare, head=head.eval().requires_grad_(False))
