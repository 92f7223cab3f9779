"""A model from one file: `.safetensors`, or a `.ckpt` whose pickle is read as tensors only.

Such files have the layout of the original Stable Diffusion code (Rombach et al. 2022). How wide and deep the networks
are is read from the tensors' shapes, all else from the table of families; nothing is asked of a hub.
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from grounded_diffusion.errors import CheckpointError
from grounded_diffusion.families import FAMILIES, NOISE, Family, TextTower, family_of

State = Mapping[str, torch.Tensor]

TOLD, LCM = "model.diffusion_model.time_embed.cond_proj.weight", ("lcm", "sdxl-lcm")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
HEAD_WIDTH = 64  # channels of a head of all these text encoders, and of UNets whose family does not count heads
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SIZES = 6  # numbers of sizes that SDXL's UNet takes: of the original image, its crop, and the image to make
LISTED = 8  # tensors that an error names
# What a file is that is none of the families: a part of a tensor's name -> what to say.
OTHERS = {
    "joint_blocks.": "Stable Diffusion 3, a transformer",
    "double_blocks.": "FLUX or another transformer",
    "transformer_blocks.0.attn.add_": "a diffusion transformer",
    "lora": "a LoRA; give it with --lora beside a --base",
    "conditioner.embedders.0.model.": "the refiner of SDXL, which only goes on from an image",
    "control_model.": "a ControlNet",
    "down_blocks.": "one part of a model in diffusers' layout; give the model's folder",
    "encoder.down.": "an autoencoder; give it with --vae beside a --base",
    "input_blocks.": "a UNet alone; files of whole models are read",
}


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name. Code in a pickle is refused, not run. Raises CheckpointError."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is damaged or holds code beside its tensors, which is never run; use the model's .safetensors file"
        ) from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        detail = next(iter(str(error).splitlines()), "it ends early")[:100]
        raise CheckpointError(f"{path} cannot be read as a file of tensors ({detail})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name")
    return tensors


def recognise(path: str | Path, state: State, name: str | None = None) -> str:
    """The family of a file's model, by its tensors; `name` chooses among those whose files look the same.

    Raises:
        UsageError: there is no family `name`.
        CheckpointError: a file of another kind, or of another family than `name`.
    """
    first = state.get(f"{UNET}input_blocks.0.0.weight")
    layouts = {family.layout for family in FAMILIES.values()}
    prefixes = {prefix for layout in layouts for prefix in layout}
    found = {prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)}
    layout = next((layout for layout in layouts if set(layout) == found), None)
    if first is None or layout is None:
        what = next((what for part, what in OTHERS.items() if any(part in key for key in state)), "no model known here")
        titles = "; ".join(dict.fromkeys(family.title for family in FAMILIES.values()))
        raise CheckpointError(f"{path} looks like {what}; known are {titles}")
    if first.shape[1] != 4:
        what = {9: "an inpainting model", 8: "a model that edits images"}.get(first.shape[1], "another kind of model")
        raise CheckpointError(f"{path} is {what}: its UNet takes {first.shape[1]} channels instead of 4")
    told = TOLD in state  # of LCM, which is else as the model that it was made from
    alike = [key for key, family in FAMILIES.items() if family.layout == layout and (key in LCM) == told]
    if name is None:
        return alike[0]
    if family_of(name).layout != layout or name not in alike:
        raise CheckpointError(f"{path} is no {family_of(name).title}; its tensors are those of {' or '.join(alike)}")
    return name


def count(state: State, prefix: str) -> int:
    """How many numbered children a prefix has, as in prefix0., prefix1., ..."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def unet_config(state: State, family: Family, pooled: int = 0) -> dict[str, Any]:
    """The configuration of a UNet in the original layout, its `UNET` prefix removed; `pooled`: width of pooled text."""
    levels: list[dict[str, int]] = [{"width": 0, "layers": 0, "depth": 0}]
    for i in range(1, count(state, "input_blocks.")):
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in state:
            levels.append({"width": 0, "layers": 0, "depth": 0})
            continue
        depth = count(state, f"{block}.1.transformer_blocks.")
        width = state[f"{block}.0.out_layers.3.weight"].shape[0]
        levels[-1] = {"width": width, "layers": levels[-1]["layers"] + 1, "depth": depth}
    attends = [level["depth"] > 0 for level in levels]
    crosses = next(key for key in state if key.endswith("attn2.to_k.weight"))
    projection = next(key for key in state if key.endswith(".proj_in.weight"))
    widths = [level["width"] for level in levels]
    depths = [level["depth"] or 1 for level in levels]
    depths[-1] = count(state, "middle_block.1.transformer_blocks.") or depths[-1]
    config = dict(
        sample_size=family.image_size // 8,
        block_out_channels=widths,
        layers_per_block=levels[0]["layers"],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        cross_attention_dim=state[crosses].shape[1],
        attention_head_dim=family.heads or [max(1, width // HEAD_WIDTH) for width in widths],
        transformer_layers_per_block=depths,
        use_linear_projection=state[projection].ndim == 2,
    )
    if (told := state.get(TOLD.removeprefix(UNET))) is not None:
        config["time_cond_proj_dim"] = told.shape[1]
    if "label_emb.0.0.weight" in state:
        added = state["label_emb.0.0.weight"].shape[1]
        sizes = dict(addition_time_embed_dim=(added - pooled) // SIZES, projection_class_embeddings_input_dim=added)
        config |= dict(addition_embed_type="text_time", **sizes)
    return config


def vae_config(state: State, family: Family) -> dict[str, Any]:
    """The configuration of an autoencoder in the original layout, its `VAE` prefix removed."""
    levels = count(state, "encoder.down.")
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return dict(
        block_out_channels=widths,
        layers_per_block=count(state, "encoder.down.0.block."),
        latent_channels=state["post_quant_conv.weight"].shape[0],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        scaling_factor=family.scaling_factor,
        sample_size=family.image_size,
    )


def fill(module: nn.Module, state: State, where: str) -> nn.Module:
    """Load converted tensors strictly, in float32; what is left over is not looked at. Raises CheckpointError."""
    expected = module.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        shown = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if len(missing) > LISTED else "")
        raise CheckpointError(f"{where} lacks {len(missing)} tensors: {shown}")
    wrong = [name for name, value in expected.items() if state[name].shape != value.shape]
    if wrong:
        raise CheckpointError(f"{where} has tensors of unexpected shapes: {', '.join(wrong[:LISTED])}")
    module.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    return module.eval().requires_grad_(False)


def part(state: State, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def load_unet(path: str | Path, state: State, family: Family) -> UNet2DConditionModel:
    """The UNet of a file."""
    try:
        projection = state.get(f"{family.text[-1].prefix}text_projection")
        config = unet_config(part(state, UNET), family, projection.shape[1] if family.text[-1].pooled else 0)
    except (KeyError, StopIteration, AttributeError) as error:
        raise CheckpointError(f"the UNet of {path} lacks tensors, among them {error}") from None
    unet = UNet2DConditionModel(**config)
    converted = convert_ldm_unet_checkpoint(dict(state), unet.config)
    if TOLD in state:  # diffusers has no name for it in this layout
        converted["time_embedding.cond_proj.weight"] = state[TOLD]
    return fill(unet, converted, f"the UNet of {path}")


def load_vae(path: str | Path, state: State, family: Family) -> AutoencoderKL:
    """The autoencoder of a file, of a whole model's or of its own."""
    own = part(state, VAE) or dict(state)
    try:
        vae = AutoencoderKL(**vae_config(own, family))
    except KeyError as error:
        raise CheckpointError(f"the autoencoder of {path} lacks tensors, among them {error}") from None
    prefixed = {f"{VAE}{name}": value for name, value in own.items()}
    return fill(vae, convert_ldm_vae_checkpoint(prefixed, vae.config), f"the autoencoder of {path}")


def load_text_encoder(path: str | Path, state: State, tower: TextTower, tokenizer: CLIPTokenizer) -> nn.Module:
    """One text encoder of a file."""
    where, own = f"the text encoder of {path}", part(state, tower.prefix)
    embedding = next((v for k, v in own.items() if k.endswith("token_embedding.weight")), None)
    blocks = "transformer.resblocks." if tower.open_clip else "text_model.encoder.layers."
    if embedding is None or not count(own, blocks):
        raise CheckpointError(f"{where} lacks its tensors under {tower.prefix}")
    if len(tokenizer) != len(embedding):
        raise CheckpointError(
            f"{where} has {len(embedding)} tokens, the tokenizer has {len(tokenizer)}; give --tokenizer"
        )
    width, layers = embedding.shape[1], count(own, blocks)
    config = CLIPTextConfig(
        vocab_size=len(embedding), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers - (tower.open_clip and not tower.penultimate), hidden_act=tower.activation,
        num_attention_heads=max(1, width // HEAD_WIDTH), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = (CLIPTextModelWithProjection if tower.pooled else CLIPTextModel)(config)
    if tower.open_clip:
        tensors = convert_open_clip_checkpoint(encoder, dict(state), tower.prefix)
    else:
        tensors = convert_ldm_clip_checkpoint(dict(state))
    if not hasattr(encoder, "text_model"):  # since transformers 5.6
        tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    return fill(encoder, tensors, where)


def make_scheduler(family: Family) -> Any:
    """The scheduler of a family."""
    kind, options = family.scheduler
    given = NOISE | dict(prediction_type=family.prediction) | dict(options)
    cls = getattr(diffusers, kind)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in given.items() if name in known})


def pad_token(tokenizer: CLIPTokenizer, tower: TextTower) -> CLIPTokenizer:
    """The tokenizer with a family's own padding."""
    if tower.pad is not None:
        tokenizer.pad_token = tower.pad
    return tokenizer


def load_single_file(
    path: str | Path, tokenizer: Callable[[], CLIPTokenizer], name: str | None = None
) -> dict[str, Any]:
    """All parts of a model from one file, by name; and `family`.

    Args:
        path: the file.
        tokenizer: finds CLIP's, which no file holds; asked once the file is known to be a model.
        name: the family, where several have files that look the same.

    Raises:
        CheckpointError: not a model, of no known family, or tensors missing (listed).
    """
    state = read_tensors(path)
    key = recognise(path, state, name)
    family = FAMILIES[key]
    tokenizer = pad_token(tokenizer(), family.text[0])
    parts = dict(
        unet=load_unet(path, state, family),
        vae=load_vae(path, state, family),
        tokenizer=tokenizer,
        scheduler=make_scheduler(family),
        family=key,
    )
    for number, tower in enumerate(family.text):
        parts["text_encoder" + ("_2" if number else "")] = load_text_encoder(path, state, tower, tokenizer)
    return parts


def load_vae_file(path: str | Path, family: str) -> AutoencoderKL:
    """An autoencoder of its own: a file of either layout, or a folder in diffusers' format. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        try:
            return AutoencoderKL.from_pretrained(path).float().eval().requires_grad_(False)
        except Exception as error:  # diffusers raises many kinds
            raise CheckpointError(f"cannot load an autoencoder from {path}: {str(error).splitlines()[0]}") from None
    if not path.is_file():
        raise CheckpointError(f"there is no autoencoder at {path}")
    state = read_tensors(path)
    if not any("encoder.down_blocks." in name for name in state):
        return load_vae(path, state, FAMILIES[family])
    beside = path.with_name("config.json")
    if not beside.is_file():
        raise CheckpointError(f"{path} is in diffusers' layout, whose sizes are in config.json; give its folder")
    vae = AutoencoderKL.from_config(json.loads(beside.read_text(encoding="utf-8")))
    return fill(vae, state, f"the autoencoder {path}")
