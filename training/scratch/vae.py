"""The autoencoder: diffusers' AutoencoderKL, trained on rendered scenes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from grounded_diffusion.training.devices import fast_autocast
from grounded_diffusion.training.images import save_grid
from grounded_diffusion.training.loop import step_generator, train
from grounded_diffusion.training.scratch.config import TrainConfig, table_errors
from grounded_diffusion.training.things.world import World

KL_WEIGHT = 1e-6  # Rombach et al., 2022, section 4: a slight penalty only


@table_errors("vae")
def build_vae(config: TrainConfig) -> AutoencoderKL:
    """A three-level (f4) autoencoder unless the configuration says otherwise."""
    sizes = dict(block_out_channels=(16, 48, 96), layers_per_block=1, norm_num_groups=8, latent_channels=4)
    sizes |= dict(mid_block_add_attention=False, sample_size=config.world.size) | config.vae
    levels = len(sizes["block_out_channels"])
    sizes |= dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return AutoencoderKL(**sizes)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images in [-1, 1]."""
    return -10 * math.log10(((a - b) / 2).square().mean().item())


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, world: World, seed: int) -> float:
    """The scaling factor that gives the latents of rendered scenes unit variance."""
    images = world.render(512, step_generator(seed, 1 << 31), captions=False).images
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(64)])
    return 1 / latents.std().item()


def train_vae(config: TrainConfig, world: World, folder: Path) -> AutoencoderKL:
    """Train and save `folder/vae`; goes on from `folder/vae.state.pt` where there is one."""
    start = AutoencoderKL.from_pretrained(config.init["vae"], subfolder="vae").float() if "vae" in config.init else None
    if start and "vae" not in config.stages:
        start.save_pretrained(folder / "vae")
        return start
    stage = config.stages["vae"]
    torch.manual_seed(stage.seed)
    vae = (start or build_vae(config)).to(world.bank.device, memory_format=torch.channels_last)
    device = world.bank.device.type
    held_out = world.render(64, step_generator(stage.seed + 1, 0), captions=False).images

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        images = world.render(stage.batch, generator, captions=False).images
        images = images.contiguous(memory_format=torch.channels_last)
        with fast_autocast(device):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return (decoded.float() - images).square().mean() + KL_WEIGHT * kl

    def sample(model: AutoencoderKL, step: int) -> str:
        decoded = model.decode(model.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1)
        save_grid(torch.cat([held_out[:16], decoded[:16]]), folder / f"vae-{step:06d}.png", columns=16)
        return f"PSNR {psnr(decoded, held_out):.2f} dB on held-out scenes"

    vae = train("vae", vae, stage, folder, loss, sample)
    vae.register_to_config(scaling_factor=measure_latents(vae, world, stage.seed + 1))
    vae.save_pretrained(folder / "vae")
    return vae
