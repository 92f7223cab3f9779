"""What is checked in of the things model is what its card says."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.loop import step_generator
from grounded_diffusion.training.scratch.config import load_config
from grounded_diffusion.training.scratch.unet import TextToImage, denoising_loss, tokenize
from grounded_diffusion.training.scratch.vae import psnr
from grounded_diffusion.training.things.world import World, WorldConfig

ROOT = Path(__file__).parents[3]
NAMES = ["bottle", "car", "horse", "motorbike", "potted plant", "fire hydrant"]


def test_its_configuration_goes_on_from_weights_that_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("models/things-64.toml")
    assert config.init == {"vae": "models/things-64", "unet": "models/things-64"}
    assert "vae" not in config.stages


def test_its_autoencoder_keeps_what_it_never_saw():
    """Three quarters of the names, and these models of the others, were not in its training."""
    scenes = World(WorldConfig(), held_out=True).render(32, step_generator(13, 0), captions=False).images
    vae = AutoencoderKL.from_pretrained(ROOT / "models/things-64", subfolder="vae").float()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(scenes).latent_dist.mode()).sample.clamp(-1, 1)
    assert psnr(decoded, scenes) > 29.5


def test_it_has_learnt_what_its_captions_say():
    """Scenes are easier to clean of noise with their own captions than with those of others."""
    world, parts = World(WorldConfig(models=1, views=1), NAMES), load_base(ROOT / "models/things-64")
    assert parts["family"] == "sd1"
    scene = world.render(24, step_generator(17, 0))
    with torch.no_grad():
        latents = parts["vae"].encode(scene.images).latent_dist.mode() * parts["vae"].config.scaling_factor
        model = TextToImage(parts["unet"], parts["text_encoder"])
        of = lambda captions: denoising_loss(
            model, parts["scheduler"], latents, tokenize(parts["tokenizer"], captions), step_generator(19, 0)
        ).item()
        own, others = of(scene.captions), of(scene.captions[1:] + scene.captions[:1])
    assert own < 0.25
    assert others > 1.1 * own
