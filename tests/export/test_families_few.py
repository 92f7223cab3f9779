"""Families of few steps and of two text encoders: each draws with its own settings what diffusers draws."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.families import pipeline_of, tiny_parts

from grounded_diffusion.bundle import open_bundle, write_manifest
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.export.bundle import describe, export_bundle
from grounded_diffusion.export.verify import check_graphs, check_loop, psnr, table
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.checkpoint import RELEASED_TEMPLATE, Checkpoint
from grounded_diffusion.training.generator.single_file import make_scheduler
from grounded_diffusion.training.generator.text import template_states
from grounded_diffusion.training.head.attention import (
    AttentionConfig,
    AttentionHead,
    affinity_features,
)
from grounded_diffusion.training.head.queried import cross_attentions

SIDE, SIZE, SEED = 16, 32, 7  # latents, pixels
PROMPT = "a photograph of a dog"
TOLD = ("attn2.to_v.weight", "attn2.to_out.0.weight", "add_embedding.linear_2.weight", "cond_proj")
FEW = {"sd-turbo": 2, "lcm": 4, "sdxl": 5, "sdxl-turbo": 3}  # steps


def tiny_model(family):
    """Parts of a random model of a family, small, and minding what it is told, which random UNets hardly do."""
    torch.set_num_threads(1)
    parts = tiny_parts(family)
    parts["unet"].register_to_config(sample_size=SIDE)
    for name, weight in parts["unet"].named_parameters():
        if any(part in name for part in TOLD):
            weight.data *= 10
    return parts


def with_head(parts, family):
    """As a checkpoint, with an attention head under whose thresholds it has masks."""
    unet = parts["unet"]
    bare = Checkpoint(**parts, head=None, family=family, capture_timestep=121, sampling={"steps": FEW[family]})
    layers = cross_attentions(unet)
    config = AttentionConfig(
        tuple((layer, 1 / len(layers)) for layer in layers),
        affinity_features(unet),
        presence=0,
        floor=0,
        alone=-100,
        relative=0.9,
    )
    words = template_states(bare.tower, bare.tokenizer, RELEASED_TEMPLATE)
    head = AttentionHead(config, unet, words, bare.latent_size).eval().requires_grad_(False)
    return Checkpoint(**parts, head=head, family=family, capture_timestep=121, sampling=bare.sampling)


@pytest.fixture(scope="module")
def exported_as(tmp_path_factory):
    """Exports a family's checkpoint once. SDXL-Turbo's graphs are SDXL's, so its bundle differs by the manifest."""
    made = {}

    def export(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family) / "bundle"
            if family == "sdxl-turbo":
                base, _, graphs = export("sdxl")
                parts = base | {"scheduler": make_scheduler(FAMILIES[family])}
                checkpoint = with_head(parts, family)
                shutil.copytree(graphs, folder)
                files = open_bundle(folder).manifest.files
                write_manifest(folder, replace(describe(checkpoint, "fp32"), files=files))
            else:
                parts = tiny_model(family)
                checkpoint = with_head(parts, family)
                export_bundle(checkpoint, folder)
            made[family] = parts, checkpoint, folder
        return made[family]

    return export


@pytest.fixture(params=FEW)
def exported(request, exported_as):
    return request.param, *exported_as(request.param)


def diffusers_image(monkeypatch, parts, steps, guidance, noise, **more):
    """The image of diffusers' own pipeline, its scheduler drawing the engine's noise."""
    for kind in ("lcm", "euler_ancestral_discrete"):
        drawn = (torch.from_numpy(batch_normal([(SEED, 0)], noise.shape[1:], row + 1)) for row in range(steps))
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{kind}.randn_tensor", lambda *_, d=drawn, **__: next(d))
    pipeline = pipeline_of(parts)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        PROMPT, latents=torch.from_numpy(noise), height=SIZE, width=SIZE, num_inference_steps=steps,
        guidance_scale=guidance, output_type="np", **more,
    ).images[0]  # fmt: skip
    return (image * 255).round()


def test_images_are_those_of_diffusers(exported, monkeypatch):
    """Without options, each with the sampler, steps and guidance of its card."""
    family, parts, _, folder = exported
    noise = np.random.default_rng(0).standard_normal((1, 4, SIDE, SIDE)).astype(np.float32)
    guidance = {"sdxl": 5.0, "lcm": 8.0}.get(family, 0.0)
    with GroundedPipeline.open(folder, threads=1) as pipe:
        sample = next(pipe.generate("a photograph of a [dog]", seed=SEED, noise=noise))
        other = next(pipe.generate("the sea on a red [table]", seed=SEED, noise=noise))
    expected = diffusers_image(monkeypatch, parts, FEW[family], guidance, noise)
    assert psnr(sample.image, expected) >= 50
    assert psnr(other.image, expected) < 50
    assert sample.masks["dog"].any()


def test_guidance_and_negative_prompts_count(exported, monkeypatch):
    """SDXL's empty negative prompt is zeros, a text is a text; LCM is told the scale."""
    family, parts, _, folder = exported
    noise = np.random.default_rng(1).standard_normal((1, 4, SIDE, SIDE)).astype(np.float32)
    told = {"negative_prompt": "the sea"} if family == "sdxl" else {}
    with GroundedPipeline.open(folder, threads=1) as pipe:
        options = Options(seed=SEED, guidance_scale=3.0, negative_prompt=told.get("negative_prompt"))
        sample = next(pipe.generate("a photograph of a [dog]", options, noise=noise))
    expected = diffusers_image(monkeypatch, parts, FEW[family], 3.0, noise, **told)
    assert psnr(sample.image, expected) >= 50


def test_graphs_are_within_tolerance(exported):
    _, _, checkpoint, folder = exported
    rows = [*check_graphs(checkpoint, folder), *check_loop(checkpoint, folder)]
    assert all(row.passed for row in rows), "\n".join(table(rows))


def test_a_context_has_rows_for_what_else_the_model_is_told(exported):
    family, _, _, folder = exported
    manifest = open_bundle(folder).manifest
    assert manifest.context_rows == {"sd-turbo": 77, "lcm": 78, "sdxl": 78, "sdxl-turbo": 78}[family]
    assert manifest.guidance_embedding == (32 if family == "lcm" else 0)
