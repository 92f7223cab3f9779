"""Fixtures that several folders' tests share: a tiny checkpoint and the bundle exported from it."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import grounded_diffusion  # noqa: F401 - found while the checkout is on the path

# `python -m pytest` puts the checkout on the path, and there its folder kernels/ would pass for the package of that
# name which transformers uses where it is installed. Ours are all below grounded_diffusion.
CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]

TINY_CORPUS = (
    "a photograph of a dog and a cat on a red background next to an aeroplane with a potted plant near the "
    "dining table and the tv monitor while a unicorn and a dragon look at a rocket over the sea"
)


def pytest_addoption(parser):
    parser.addoption("--cuda-kernels", metavar="LIBRARY", help="CUDA kernels for the CPU that are built already")


def tiny_model():
    """A randomly initialised Stable-Diffusion-format model of three levels with a grounding head, as a Checkpoint."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from grounded_diffusion.training.checkpoint import Checkpoint
    from grounded_diffusion.training.emoji.base import train_tokenizer
    from grounded_diffusion.training.head.head import GroundingHead, HeadConfig

    torch.manual_seed(0)
    tokenizer = train_tokenizer([TINY_CORPUS] * 10, 658)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    head = GroundingHead(
        HeadConfig.for_unet(unet.config, reduced_channels=(8, 16, 16), embed_dim=32, ffn_dim=64, patch=2, image_scale=4)
    )
    return Checkpoint(
        unet.eval(), vae.eval(), CLIPTextModel(text_config).eval(), tokenizer, scheduler, head.eval(),
        names=dict(seen=["dog", "cat"], unseen=["unicorn"]),
    )  # fmt: skip


@pytest.fixture(scope="session")
def cuda_builds(tmp_path_factory):
    """Where CUDA kernels for the CPU are compiled to."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Directory of a tiny checkpoint: 64x64 images, 16x16 latents, 3 levels, text width 32. Do not write to it."""
    import torch

    from grounded_diffusion.training.checkpoint import save_checkpoint

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_checkpoint(path, tiny_model())
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint, tmp_path_factory):
    """Directory of the bundle exported from `tiny_checkpoint`. Do not write to it."""
    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(load_checkpoint(tiny_checkpoint), path)
    return path
