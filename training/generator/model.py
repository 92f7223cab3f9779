"""A model of any form that people have: a folder in diffusers' format, a hub's name, or one file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from grounded_diffusion.bundle import Sampling
from grounded_diffusion.engine.checks import listing
from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.reading import Misfit, as_type, load_json, read_file
from grounded_diffusion.training.generator.lora import fuse, said_of_runs
from grounded_diffusion.training.generator.single_file import SUFFIXES, load_single_file, load_vae_file
from grounded_diffusion.training.generator.vocabulary import find_tokenizer
from grounded_diffusion.training.hub import HUB_NAME

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SENTENCE = "a photograph of a dog and a cat"
SAMPLING = "sampling.json"  # in a model's folder: sampler, steps, guidance_scale, guidance_interval of its runs
OWN = ("sampler", "steps", "guidance_scale", "guidance_interval")
LEGACY_EOS = 2  # in the configurations of Stable Diffusion 1.x; transformers then takes the highest id for the end


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _load_module(kind: type, source: str | Path, part: str) -> torch.nn.Module:
    """One module of a model in float32. Nothing in a file is ever run as code. Raises CheckpointError."""
    try:
        # As it is without accelerate, whose other way of loading words its errors differently.
        plain = {} if issubclass(kind, PreTrainedModel) else {"low_cpu_mem_usage": False}
        module, report = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **plain)
    except Exception as error:  # the two libraries raise a dozen kinds for unreadable files
        raise CheckpointError(f"cannot load {part} of {source}: {first_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{part} of {source} lacks {len(missing)} tensors: {listing(missing)}")
    if wrong := report["mismatched_keys"]:
        names = listing(str(entry[0]) for entry in wrong)
        raise CheckpointError(
            f"{part} of {source} has {len(wrong)} tensors of other shapes than its config says: {names}"
        )
    return module.float().eval().requires_grad_(False)


def _load_scheduler(source: str | Path) -> Any:
    """The scheduler a model names in its own configuration."""
    try:
        config = diffusers.DDIMScheduler.load_config(source, subfolder="scheduler")
        kind = getattr(diffusers, config["_class_name"])
        return kind.from_config(config)
    except Exception as error:
        raise CheckpointError(f"cannot load scheduler of {source}: {first_line(error)}") from None


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


def family_of_config(unet: Any, scheduler: Any) -> str:
    """The family of a folder's model, by its own configurations."""
    trailing = scheduler.get("timestep_spacing") == "trailing"
    if unet.get("time_cond_proj_dim"):
        return "sdxl-lcm" if unet.get("addition_embed_type") else "lcm"
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl-turbo" if trailing else "sdxl"
    if not unet.get("use_linear_projection"):
        return "sd1"
    if trailing:
        return "sd-turbo"
    return "sd2" if scheduler.get("prediction_type") == "v_prediction" else "sd2-base"


def load_folder(source: str | Path) -> dict[str, Any]:
    """All parts of a model in diffusers' format, by name, and `family`.

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
    if parts["unet"].config.get("addition_embed_type") == "text_time":
        parts["text_encoder_2"] = _load_module(CLIPTextModelWithProjection, source, "text_encoder_2")
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
    except Exception as error:
        raise CheckpointError(f"cannot load tokenizer of {source}: {first_line(error)}") from None
    check_tokenizer(source, parts["tokenizer"], parts["text_encoder"].config)
    parts["scheduler"] = _load_scheduler(source)
    parts["family"] = family_of_config(parts["unet"].config, parts["scheduler"].config)
    parts["sampling"] = read_sampling(Path(source) / SAMPLING)
    return parts


def read_sampling(file: Path) -> dict[str, Any]:
    """How a model's own folder says that it is best run; {} where it says nothing. Raises CheckpointError."""
    if not file.is_file():
        return {}
    try:
        content = read_file(file)
        said = load_json(content)
        as_type(said, Sampling, content)
    except Misfit as error:
        raise CheckpointError(f"{error.at(file)}; it must be an object of {', '.join(OWN)}") from None
    return said


def save_base(path: Path, parts: Mapping[str, Any]) -> None:
    """Write a model of one text encoder as `load_folder` gives it, in diffusers' format and the precision it has."""
    pipeline = StableDiffusionPipeline(
        **{part: parts[part] for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    for file in path.glob("*/*config.json"):  # both libraries note the folder a module was loaded from
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if parts["sampling"]:
        (path / SAMPLING).write_text(json.dumps(parts["sampling"], indent=1) + "\n", encoding="utf-8")


def load_base(
    source: str | Path,
    *,
    family: str | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
) -> dict[str, Any]:
    """A model without a head: its parts by name, and `family`, in float32 and evaluation mode.

    Args:
        source: a directory in diffusers' format, the name of a model on the Hugging Face hub, or one file.
        family: one of FAMILIES, for a file whose tensors fit several.
        tokenizer: where a file's tokenizer is, see `find_tokenizer`.
        vae: another autoencoder, see `load_vae_file`.
        loras: (file, scale) of LoRAs to be added to the weights, in this order; one may say how the model is then run.

    Raises:
        UsageError: options for a file with a directory.
        CheckpointError: not a model of a known family, unreadable, or with missing tensors, which are listed.
    """
    if Path(source).suffix in SUFFIXES and not Path(source).is_dir():
        if not Path(source).is_file():
            raise CheckpointError(f"there is no file {source}")
        parts = load_single_file(source, lambda: find_tokenizer(tokenizer), family)
    else:
        if family or tokenizer:
            raise UsageError("--family and --tokenizer are for a single file; a model's folder says both itself")
        parts = load_folder(source)
    if vae is not None:
        parts["vae"] = load_vae_file(vae, parts["family"])
    for path, scale in loras:
        fuse(path, scale, parts)
        sampling, timesteps = said_of_runs(path)
        parts["sampling"] = parts.get("sampling", {}) | sampling
        if timesteps:
            parts["scheduler"].register_to_config(timesteps=timesteps)
    check_parts(source, parts)
    return parts


def check_parts(source: str | Path, parts: dict[str, Any]) -> None:
    """Raise CheckpointError unless the parts fit one another as those of a known family do."""
    unet, latent = parts["unet"].config, parts["vae"].config.latent_channels
    extra = [key for key in ("class_embed_type", "encoder_hid_dim") if unet.get(key)]
    if extra:
        raise CheckpointError(f"{source} is of no known family: its UNet takes more inputs ({', '.join(extra)})")
    if unet.get("addition_embed_type") not in (None, "text_time"):
        raise CheckpointError(f"{source} is of no known family: its UNet takes {unet.addition_embed_type}")
    encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if parts.get(name) is not None]
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if unet.cross_attention_dim != width:
        raise CheckpointError(f"{source}: the UNet reads text of width {unet.cross_attention_dim}, not {width}")
    if (unet.in_channels, unet.out_channels) != (latent, latent):
        raise CheckpointError(f"{source}: UNet and autoencoder disagree on the latent's channels")
