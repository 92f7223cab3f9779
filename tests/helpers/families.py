"""Small random models of every family, in diffusers' format and as one file."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.emoji.base import train_tokenizer
from grounded_diffusion.training.generator.single_file import make_scheduler, pad_token
from helpers.original_layout import original
from helpers.tiny import TINY_CORPUS

WIDTH = 64  # of text encoders; one head


def tiny_parts(name: str) -> dict:
    """A random model of a family: two levels, 8x8 latents... of two text encoders where the family has them."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    tokenizer = pad_token(train_tokenizer([TINY_CORPUS] * 10, 658), family.text[0])
    parts = dict(tokenizer=tokenizer, scheduler=make_scheduler(family))
    for number, tower in enumerate(family.text):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=1, projection_dim=WIDTH, hidden_act=tower.activation, max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        kind = CLIPTextModelWithProjection if tower.pooled else CLIPTextModel
        parts["text_encoder" + ("_2" if number else "")] = kind(config).eval()
    sized = {}
    if family.text[-1].pooled:
        sized = dict(addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=[1, 2])
        sized |= dict(projection_class_embeddings_input_dim=WIDTH + 6 * 8)
    if name in ("lcm", "sdxl-lcm"):
        sized["time_cond_proj_dim"] = 32
    linear = family.heads is None
    parts["unet"] = UNet2DConditionModel(
        sample_size=family.image_size // 8, block_out_channels=(64, 128), layers_per_block=1,
        cross_attention_dim=WIDTH * len(family.text), attention_head_dim=[1, 2] if linear else 8,
        use_linear_projection=linear, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **sized,
    ).eval()  # fmt: skip
    parts["vae"] = AutoencoderKL(
        block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, sample_size=family.image_size,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
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
