"""Checkpoints: a diffusers-format Stable Diffusion directory with a grounding head beside it.

    CHECKPOINT/{model_index.json,unet/,vae/,text_encoder/,tokenizer/,scheduler/}   what diffusers itself loads
    CHECKPOINT/grounding_head/{config.json,model.safetensors}                      what this project adds

The other form people have is a plain Stable Diffusion 1.x model and the paper's `grounding_module.pth`.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig, load_released, load_state
from grounded_diffusion.training.hub import HUB_NAME

HEAD = "grounding_head"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SENTENCE = "a photograph of a dog and a cat"
LEGACY_EOS = 2  # in the configurations of Stable Diffusion 1.x; transformers then takes the highest id for the end
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
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    head: GroundingHead
    capture_timestep: int = RELEASED_TIMESTEP
    query_template: str = RELEASED_TEMPLATE
    names: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        steps = self.scheduler.config.num_train_timesteps
        if not 0 <= self.capture_timestep < steps:
            raise CheckpointError(f"capture_timestep is {self.capture_timestep}; the scheduler has 0 to {steps - 1}")
        if self.query_template.count("{}") != 1:
            raise CheckpointError(f"query_template {self.query_template!r} must hold {{}} once, for the object's name")

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


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float16) -> None:
    """Write a checkpoint directory, its weights in `dtype`; `StableDiffusionPipeline.from_pretrained` loads it too.

    The head's buffers (statistics, spectral norm) stay in float32. The checkpoint's own modules are not changed.
    """
    path = Path(path)
    modules = {name: copy.deepcopy(getattr(checkpoint, name)) for name in PARTS[:3]}
    for parameter in (p for module in modules.values() for p in module.parameters()):
        parameter.data = parameter.data.to("cpu", dtype)
    pipeline = StableDiffusionPipeline(
        **modules,
        tokenizer=checkpoint.tokenizer,
        scheduler=checkpoint.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    for file in path.glob("*/*config.json"):  # both libraries note the folder a module was loaded from
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: value.detach().to("cpu", copy=True) for name, value in checkpoint.head.state_dict().items()}
    weights |= {name: value.detach().to("cpu", dtype) for name, value in checkpoint.head.named_parameters()}
    (path / HEAD).mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, path / HEAD / "model.safetensors")
    about = dict(
        head=asdict(checkpoint.head.config),
        capture_timestep=checkpoint.capture_timestep,
        query_template=checkpoint.query_template,
        names=checkpoint.names,
    )
    (path / HEAD / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _load_module(kind: type, source: str | Path, part: str) -> torch.nn.Module:
    """One module of a model in float32. Nothing in a file is ever run as code. Raises CheckpointError."""
    try:
        # As it is without accelerate, whose other way of loading words its errors differently.
        plain = {} if kind is CLIPTextModel else {"low_cpu_mem_usage": False}
        module, report = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **plain)
    except Exception as error:  # the two libraries raise a dozen kinds for unreadable files
        raise CheckpointError(f"cannot load {part} of {source}: {_first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{part} of {source} lacks {len(missing)} tensors: {', '.join(missing)}")
    if wrong := report["mismatched_keys"]:
        names = ", ".join(sorted(str(entry[0]) for entry in wrong))
        raise CheckpointError(f"{part} of {source} has tensors of other shapes than its config says: {names}")
    return module.float().eval().requires_grad_(False)


def _load_scheduler(source: str | Path) -> Any:
    """The scheduler a model names in its own configuration."""
    try:
        config = diffusers.DDIMScheduler.load_config(source, subfolder="scheduler")
        kind = getattr(diffusers, config["_class_name"])
        return kind.from_config(config)
    except Exception as error:
        raise CheckpointError(f"cannot load scheduler of {source}: {_first_line(error)}") from None


def load_base(source: str | Path) -> dict[str, Any]:
    """Modules of a Stable Diffusion 1.x model in diffusers format, by part.

    Args:
        source: a directory, or the name of a model on the Hugging Face hub ("owner/name").

    Raises:
        CheckpointError: not such a model, unreadable, or with missing tensors, which are listed.
    """
    if Path(source).exists() or not HUB_NAME.fullmatch(str(source)):
        if not (Path(source) / "model_index.json").is_file():
            raise CheckpointError(
                f"{source} is not a checkpoint: it has no model_index.json; give a diffusers-format directory"
            )
        if absent := [part for part in PARTS if not (Path(source) / part).is_dir()]:
            raise CheckpointError(f"{source} is not a whole checkpoint: it has no {', '.join(absent)}")
    kinds = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)
    parts: dict[str, Any] = {part: _load_module(kind, source, part) for part, kind in kinds.items()}
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
    except Exception as error:
        raise CheckpointError(f"cannot load tokenizer of {source}: {_first_line(error)}") from None
    check_tokenizer(source, parts["tokenizer"], parts["text_encoder"].config)
    parts["scheduler"] = _load_scheduler(source)
    check_family(source, parts["unet"], parts["vae"], parts["text_encoder"])
    return parts


def check_tokenizer(source: str | Path, tokenizer: CLIPTokenizer, config: Any) -> None:
    """Raise CheckpointError unless the tokenizer is the one that the text encoder was trained with.

    A tokenizer that lacks its files loads all the same, and turns every prompt into the same tokens.
    """
    if len(tokenizer) != config.vocab_size:
        told = f"knows {len(tokenizer)} tokens, its text encoder {config.vocab_size}"
    elif (found := special_tokens(tokenizer, config))[0] != found[1]:
        told = f"begins and ends a text with the tokens {found[0]}, its text encoder with {found[1]}"
    else:
        ids = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids).split() == SENTENCE.split() and len(ids) < len(SENTENCE.replace(" ", "")):
            return
        told = f"reads {SENTENCE!r} as {tokenizer.decode(ids)!r} in {len(ids)} tokens"
    raise CheckpointError(f"the tokenizer of {source} {told}; restore the files in its folder tokenizer/")


def special_tokens(tokenizer: CLIPTokenizer, config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(begin, end) of the tokenizer, and of its text encoder."""
    own = tokenizer.bos_token_id, tokenizer.eos_token_id
    if config.eos_token_id == LEGACY_EOS:  # then the begin is not to be trusted either
        return own, (config.vocab_size - 2, config.vocab_size - 1)
    return own, (config.bos_token_id, config.eos_token_id)


def check_family(source: str | Path, unet, vae, text_encoder) -> None:
    """Raise CheckpointError unless the parts fit one another as a Stable Diffusion 1.x model's do."""
    extra = [key for key in ("class_embed_type", "addition_embed_type", "time_cond_proj_dim") if unet.config.get(key)]
    if extra or unet.config.encoder_hid_dim:
        what = ", ".join([*extra, *(["encoder_hid_dim"] if unet.config.encoder_hid_dim else [])])
        raise CheckpointError(f"{source} is not a Stable Diffusion 1.x model: its UNet takes more inputs ({what})")
    width, latent = text_encoder.config.hidden_size, vae.config.latent_channels
    if unet.config.cross_attention_dim != width:
        raise CheckpointError(f"{source}: the UNet reads text of width {unet.config.cross_attention_dim}, not {width}")
    if (unet.config.in_channels, unet.config.out_channels) != (latent, latent):
        raise CheckpointError(f"{source}: UNet and autoencoder disagree on the latent's channels")


def _load_head(folder: Path) -> tuple[GroundingHead, dict[str, Any]]:
    """The head in `folder` and what its configuration says besides."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head_config = about.pop("head")
        state = load_file(folder / "model.safetensors")
        config = HeadConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in head_config.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UsageError) as error:
        raise CheckpointError(f"cannot load the grounding head {folder}: {_first_line(error)}") from None
    head = GroundingHead(config)
    load_state(head, state, folder / "model.safetensors")
    return head.eval().requires_grad_(False), about


def untrained_checkpoint(base: str | Path, capture_timestep: int = RELEASED_TIMESTEP) -> Checkpoint:
    """A base model with a head of random weights, whose masks mean nothing: to make examples with, for a real one.

    Raises:
        CheckpointError: as `load_base`; a timestep that the model does not have.
    """
    parts = load_base(base)
    torch.manual_seed(0)
    head = GroundingHead(HeadConfig.for_unet(parts["unet"].config)).eval().requires_grad_(False)
    return Checkpoint(**parts, head=head, capture_timestep=capture_timestep)


def load_checkpoint(path: str | Path, base: str | Path | None = None) -> Checkpoint:
    """A checkpoint directory, or with `base` the paper's `grounding_module.pth` on a Stable Diffusion 1.x model.

    Args:
        path: a directory with grounding_head/, or a .pth file.
        base: for a .pth file, the model it belongs to: a diffusers-format directory, or a hub name when online.

    Raises:
        UsageError: `path` and `base` do not go together.
        CheckpointError: not a checkpoint, keys missing (listed), parts that do not fit, code in a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        if base is not None:
            raise UsageError(f"{path} is a whole checkpoint; leave out --base, which goes with a grounding_module.pth")
        if (path / "model_index.json").is_file() and not (path / HEAD).is_dir():
            raise CheckpointError(
                f"{path} has no {HEAD}/; to add the paper's head, give it as --base and grounding_module.pth as --ckpt"
            )
        parts = load_base(path)
        head, about = _load_head(path / HEAD)
        expected = HeadConfig.for_unet(parts["unet"].config).tap_channels
        if head.config.tap_channels != expected or head.config.text_dim != parts["unet"].config.cross_attention_dim:
            raise CheckpointError(f"the grounding head of {path} was made for another UNet than the one beside it")
        try:
            return Checkpoint(**parts, head=head, **about)
        except TypeError as error:
            raise CheckpointError(f"{path / HEAD / 'config.json'} has an unknown entry ({error})") from None
    if base is None:
        raise UsageError(f"{path} is only a grounding module; name its Stable Diffusion 1.x model with --base")
    parts = load_base(base)
    scale = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    config = HeadConfig.for_unet(parts["unet"].config, image_scale=scale)
    return Checkpoint(**parts, head=load_released(path, config))
