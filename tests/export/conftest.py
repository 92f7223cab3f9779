"""A model of Stable Diffusion 1.5's sizes, random, for the slow tests."""

import pytest
from helpers.sd15 import save_base


@pytest.fixture(scope="session", autouse=True)
def once(traces):
    """Equal modules are traced once."""


@pytest.fixture(scope="session")
def sd15(tiny_checkpoint, tmp_path_factory):
    """Arguments of gd-export for a model of Stable Diffusion 1.5's sizes with a head of the released layout."""
    import torch
    from transformers import CLIPTokenizer

    from grounded_diffusion.training.head.head import GroundingHead, HeadConfig

    folder = tmp_path_factory.mktemp("sd15")
    config = save_base(folder / "base", CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer"))
    torch.save(GroundingHead(HeadConfig.for_unet(config)).state_dict(), folder / "grounding_module.pth")
    return ["--ckpt", str(folder / "grounding_module.pth"), "--base", str(folder / "base")]
