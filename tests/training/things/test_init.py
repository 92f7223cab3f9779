"""Going on from the weights of a checkpoint, and words that begin from what they mean."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.scratch import SIZES
from transformers import CLIPTextModel, CLIPTokenizer

from grounded_diffusion.training import cli
from grounded_diffusion.training.scratch.config import TrainConfig, load_config
from grounded_diffusion.training.scratch.unet import (
    build_text_encoder,
    build_tokenizer,
    knows_whole,
    place_by_meaning,
    train_tokenizer,
)
from grounded_diffusion.training.things.meanings import read_meanings
from grounded_diffusion.training.things.world import NAMES, World

TINY = f"""
latents = 16
names = ["dog", "car"]
{SIZES}
[stages.unet]
steps = 1
batch = 2
lr = 0
muon_lr = 0
"""


def train(folder, text):
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(text)
    assert cli.main(["base", "--config", str(config), "--run", str(folder / "run"), "--threads", "1"]) == 0
    return folder / "run"


def weights(kind, folder, part):
    return kind.from_pretrained(folder, subfolder=part).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    first = train(tmp_path / "first", TINY + "[stages.vae]\nsteps = 1\nbatch = 2\n")
    start = TINY + f'[init]\nvae = "{first}"\nunet = "{first}"\n'
    again = train(tmp_path / "again", start)
    for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        assert same(weights(kind, first, part), weights(kind, again, part))
    vocabulary = lambda folder: CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").get_vocab()
    assert vocabulary(again) == vocabulary(first)

    # A UNet goes on under another tokenizer; a text encoder, whose tokenizer lacks words of the world, does not.
    train_tokenizer(["a dog and a car"], 300).save_pretrained(first / "tokenizer")
    moved = train(tmp_path / "moved", start)
    assert same(weights(UNet2DConditionModel, first, "unet"), weights(UNet2DConditionModel, moved, "unet"))
    assert knows_whole(CLIPTokenizer.from_pretrained(moved, subfolder="tokenizer"))
    width = json.loads((moved / "text_encoder/config.json").read_text())["vocab_size"]
    assert width == len(vocabulary(moved)) > 300


def test_an_embedding_starts_from_what_its_word_means():
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(TrainConfig(), tokenizer)
    place_by_meaning(encoder, tokenizer, read_meanings())
    table = encoder.get_input_embeddings().weight.detach()
    of = lambda word: table[tokenizer(word).input_ids[1]]
    alike = lambda a, b: torch.cosine_similarity(of(a), of(b), dim=0).item()
    assert alike("dog", "cat") > alike("dog", "truck") + 0.1
    assert alike("dog", "cat") < 0.95
    assert table.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_configuration_describes_its_scenes(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[world]\nsize = 32\nviews = 2")
    config = load_config(file)
    assert config.names == tuple(NAMES)
    assert World(config.world, ["dog"]).render(2, torch.Generator()).images.shape == (2, 3, 32, 32)
