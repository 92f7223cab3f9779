"""SDXL's autoencoder overflows in FP16, so its decoder there is one island: FP16 outside, FP32 inside."""

from dataclasses import replace

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from helpers.errors import relative_l2
from helpers.families import tiny_parts

from grounded_diffusion.bundle import VAE_DECODER
from grounded_diffusion.export.graphs import Decoder, trace
from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig

LARGE = 300.0  # latents beyond any that are drawn: inside, values pass FP16's 65504


@pytest.fixture(scope="module")
def checkpoint():
    torch.set_num_threads(1)
    parts = tiny_parts("sdxl")
    for weight in parts["vae"].decoder.conv_in.parameters():
        weight.data *= 1e4
    head = GroundingHead(HeadConfig.for_unet(parts["unet"].config))
    return Checkpoint(**parts, head=head, family="sdxl")


def decode(checkpoint, tmp_path, latents):
    model = trace(checkpoint, VAE_DECODER, "fp16")
    onnx_ir.save(model, tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    assert {value.type for value in (*session.get_inputs(), *session.get_outputs())} == {"tensor(float16)"}
    return session.run(None, {"latents": latents.astype(np.float16)})[0].astype(np.float32)


def test_what_overflows_in_fp16_does_not_overflow(checkpoint, tmp_path):
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32) * LARGE
    image = decode(checkpoint, tmp_path, latents)
    with torch.no_grad():
        expected = Decoder(checkpoint)(torch.from_numpy(latents.astype(np.float16)).float()).numpy()
    assert relative_l2(image, expected) < 2e-3
    overflowed = decode(replace(checkpoint, family="sd1"), tmp_path, latents)
    assert not np.isfinite(overflowed).all() or relative_l2(overflowed, expected) > 0.1
