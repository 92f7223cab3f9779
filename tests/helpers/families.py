"""Small random models of every family, in diffusers' format and as one file."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.generator.single_file import make_scheduler, pad_token
from grounded_diffusion.training.scratch.unet import train_tokenizer
from helpers.original_layout import original
from helpers.tiny import TINY_CORPUS


@dataclass(frozen=True, slots=True)
class Size:
    """How wide and deep a random model is: widths and layers of its text encoders, channels of UNet and autoencoder,
    transformer layers of the UNet's levels, 0 where they have no attention."""

    text: tuple[int, ...] = (64, 64)
    text_layers: tuple[int, ...] = (2, 2)
    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    depths: tuple[int, ...] = (0, 1)
    vae: tuple[int, ...] = (32, 32)


TINY = Size()
SD1 = Size((768,), (12,), (320, 640, 1280, 1280), 2, (1, 1, 1, 0), (128, 256, 512, 512))
SD2 = Size((1024,), (23,), (320, 640, 1280, 1280), 2, (1, 1, 1, 0), (128, 256, 512, 512))
SDXL = Size((768, 1280), (12, 32), (320, 640, 1280), 2, (0, 2, 4), (128, 256, 512, 512))  # of 10 layers, 24 GB hold 4


def tiny_parts(name: str, size: Size = TINY) -> dict:
    """A random model of a family, with two text encoders where the family has them; its tokenizer is always tiny."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    tokenizer = pad_token(train_tokenizer([TINY_CORPUS] * 10, 658), family.text[0])
    parts = dict(tokenizer=tokenizer, scheduler=make_scheduler(family))
    for number, (tower, width) in enumerate(zip(family.text, size.text, strict=False)):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=size.text_layers[number], num_attention_heads=width // 64, projection_dim=width,
            hidden_act=tower.activation, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        kind = CLIPTextModelWithProjection if tower.pooled else CLIPTextModel
        parts["text_encoder" + ("_2" if number else "")] = kind(config).eval()
    sized = {}
    if family.text[-1].pooled:
        depths = [1, 2] if size is TINY else [max(1, depth) for depth in size.depths]
        embed = 8 if size is TINY else 256
        sized = dict(addition_embed_type="text_time", addition_time_embed_dim=embed)
        sized |= dict(transformer_layers_per_block=depths)
        sized |= dict(projection_class_embeddings_input_dim=size.text[1] + 6 * embed)
    if name in ("lcm", "sdxl-lcm"):
        sized["time_cond_proj_dim"] = 32
    linear = family.heads is None
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in size.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(size.depths)]
    parts["unet"] = UNet2DConditionModel(
        sample_size=family.image_size // 8, block_out_channels=size.channels, layers_per_block=size.layers,
        cross_attention_dim=sum(size.text[: len(family.text)]), use_linear_projection=linear,
        attention_head_dim=[width // 64 for width in size.channels] if linear else 8,
        down_block_types=down, up_block_types=up, **sized,
    ).eval()  # fmt: skip
    parts["vae"] = AutoencoderKL(
        block_out_channels=size.vae, layers_per_block=size.layers, latent_channels=4, sample_size=family.image_size,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae), up_block_types=("UpDecoderBlock2D",) * len(size.vae),
        scaling_factor=family.scaling_factor,
    ).eval()  # fmt: skip
    return parts


def pipeline_of(parts: dict):
    """diffusers' own pipeline of a model's parts."""
    known = {key: value for key, value in parts.items() if key not in ("family", "sampling")}
    if "text_encoder_2" in known:
        second = pad_token(copy.deepcopy(known["tokenizer"]), FAMILIES["sdxl"].text[1])
        return StableDiffusionXLPipeline(**known, tokenizer_2=second, add_watermarker=False)
    return StableDiffusionPipeline(**known, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def save_tiny(folder: Path, name: str) -> tuple[dict, Path, Path]:
    """(parts, diffusers folder, single file) of a random model of a family."""
    parts = tiny_parts(name)
    pipeline_of(parts).save_pretrained(folder / "model")
    save_file(original(parts, FAMILIES[name]), folder / "model.safetensors")
    return parts, folder / "model", folder / "model.safetensors"
