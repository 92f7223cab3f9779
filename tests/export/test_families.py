"""From one file, with a LoRA, to a bundle whose images with a negative prompt are those of diffusers."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from helpers.families import pipeline_of, save_tiny
from helpers.original_layout import kohya_lora

from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.export.bundle import export_bundle
from grounded_diffusion.export.verify import check_graphs, check_loop, checked_size, psnr, table
from grounded_diffusion.training.checkpoint import load_checkpoint

SIZE = 32  # pixels a side, of images


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_images_from_a_file_are_those_of_diffusers(family, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    parts, folder, file = save_tiny(tmp_path, family)
    kohya_lora(tmp_path / "lora.safetensors", parts)
    loras = [(tmp_path / "lora.safetensors", 0.7)]
    export_bundle(load_checkpoint(None, file, tokenizer=folder, loras=loras), tmp_path / "bundle")

    pipe = GroundedPipeline.open(tmp_path / "bundle", threads=1)
    noise = np.random.default_rng(0).standard_normal((1, 4, SIZE // 2, SIZE // 2)).astype(np.float32)
    options = Options(steps=6, sampler="ddim", guidance_interval=(0.0, 1.0), size=SIZE, negative_prompt="the sea")
    sample = next(pipe.generate("a photograph of a [dog]", options, noise=noise))
    without = next(pipe.generate("a photograph of a [dog]", replace(options, negative_prompt=None), noise=noise))

    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config)
    reference = pipeline_of(parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.load_lora_weights(tmp_path / "lora.safetensors")
    reference.fuse_lora(lora_scale=0.7)
    expected = reference(
        "a photograph of a dog", negative_prompt="the sea", latents=torch.from_numpy(noise), height=SIZE, width=SIZE,
        num_inference_steps=6, guidance_scale=7.5, output_type="np",
    ).images[0]  # fmt: skip
    assert psnr(sample.image, (expected * 255).round()) >= 50
    assert psnr(sample.image, without.image) < 50

    few = Options(steps=4, sampler="lcm", guidance_scale=0, size=SIZE, seed=7)  # as with an LCM-LoRA
    sample = next(pipe.generate("a photograph of a [dog]", few, noise=noise))
    drawn = (torch.from_numpy(batch_normal([(7, 0)], noise.shape[1:], row + 1)) for row in range(few.steps))
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
    reference.scheduler = LCMScheduler.from_config(parts["scheduler"].config)
    expected = reference(
        "a photograph of a dog", latents=torch.from_numpy(noise), height=SIZE, width=SIZE, num_inference_steps=4,
        guidance_scale=0, output_type="np",
    ).images[0]  # fmt: skip
    assert psnr(sample.image, (expected * 255).round()) >= 50


def test_the_attention_head_is_exported_as_it_is(attention_bundle):
    """Its graphs and its masks, with thresholds under which a random model has masks."""
    checkpoint, folder = attention_bundle
    rows = [*check_graphs(checkpoint, folder), *check_loop(checkpoint, folder)]
    assert all(row.passed for row in rows), "\n".join(table(rows))
    pipe = GroundedPipeline.open(folder, threads=1)
    assert pipe.bundle.manifest.head["layers"] == dict(checkpoint.head.config.layers)
    sample = next(pipe.generate("a photograph of a [dog]", steps=3))
    assert sample.masks["dog"].any()


@pytest.mark.parametrize(
    ("size", "step", "compared"),
    [
        ((8, 8), 4, (8, 8)),
        ((64, 64), 8, (64, 64)),
        ((96, 96), 8, (64, 64)),
        ((128, 128), 16, (64, 64)),
        ((64, 256), 8, (32, 128)),
    ],
)
def test_large_models_are_compared_at_a_size_whose_attention_fits(size, step, compared):
    assert checked_size(size, step) == compared
