"""Fixtures that several folders' tests share: a tiny checkpoint and the bundle exported from it."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")


import pytest
from helpers.tiny import tiny_model

import grounded_diffusion  # noqa: F401 - found while the checkout is on the path

# `python -m pytest` puts the checkout on the path, and there its folder kernels/ would pass for the package of that
# name which transformers uses where it is installed. Ours are all below grounded_diffusion.
CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]


def pytest_addoption(parser):
    parser.addoption("--cuda-kernels", metavar="LIBRARY", help="CUDA kernels for the CPU that are built already")
    parser.addoption("--fake-driver", action="store_true", help="the device loop on cuda-core; see test_gpu_driver.py")
    parser.addoption("--eager-streams", action="store_true", help="streams of a device of host memory run at once")
    parser.addoption("--tiny-bundle", metavar="DIR", help="a tiny bundle that is exported already")


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
def small_checkpoint(tiny_checkpoint, tmp_path_factory):
    """Directory of the tiny checkpoint with a UNet of two levels. Do not write to it."""
    from helpers.tiny import smaller

    from grounded_diffusion.training.checkpoint import load_checkpoint, save_checkpoint

    path = tmp_path_factory.mktemp("small") / "checkpoint"
    save_checkpoint(path, smaller(load_checkpoint(tiny_checkpoint)))
    return path


@pytest.fixture(scope="session")
def traces():
    """While it lasts, equal modules are traced once."""
    from helpers.traces import traced_once

    with traced_once() as known:
        yield known


@pytest.fixture(scope="session")
def tiny_bundle(request, tmp_path_factory):
    """Directory of the bundle exported from `tiny_checkpoint`. Do not write to it."""
    if given := request.config.getoption("--tiny-bundle"):
        return Path(given)
    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint

    request.getfixturevalue("traces")
    path = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(load_checkpoint(request.getfixturevalue("tiny_checkpoint")), path)
    return path


@pytest.fixture(scope="session")
def attention_bundle(tiny_checkpoint, tmp_path_factory, traces):
    """(checkpoint, directory of its bundle) of the tiny model with an attention head that finds something anywhere."""
    from dataclasses import replace

    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint
    from grounded_diffusion.training.head.attention import AttentionHead

    checkpoint = load_checkpoint(tiny_checkpoint, head="attention")
    config = replace(checkpoint.head.config, presence=0.0, floor=0.0, alone=-100.0, relative=0.9)
    head = AttentionHead(config, checkpoint.unet, checkpoint.head.template, checkpoint.latent_size)
    checkpoint = replace(checkpoint, head=head.eval().requires_grad_(False))
    path = tmp_path_factory.mktemp("attention") / "bundle"
    export_bundle(checkpoint, path)
    return checkpoint, path


@pytest.fixture(scope="session")
def half_bundle(tiny_bundle, tmp_path_factory):
    """Directory of the tiny bundle in FP16. Do not write to it."""
    from helpers.half import to_half_bundle

    return to_half_bundle(tiny_bundle, tmp_path_factory.mktemp("half") / "bundle")
