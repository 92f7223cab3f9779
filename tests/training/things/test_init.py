"""Training on the things world, and going on from the weights of a checkpoint."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.emoji.base import build_text_encoder, build_tokenizer, knows_whole, place_by_meaning
from grounded_diffusion.training.emoji.config import TrainConfig, load_config
from grounded_diffusion.training.things.meanings import read_meanings
from grounded_diffusion.training.worlds import KINDS, open_world

TINY = """
latents = 16
names = ["dog", "car"]
[text]
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 1
[vae]
block_out_channels = [8, 16, 16]
[unet]
block_out_channels = [16, 32, 32]
norm_num_groups = 8
attention_head_dim = 2
[world]
size = 32
"""
STILL = "[stages.unet]\nsteps = 1\nbatch = 2\nlr = 0\nmuon_lr = 0\n"  # a step that changes nothing


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
    """A UNet changes worlds; a text encoder stays with its tokenizer."""
    emoji = train(tmp_path / "emoji", TINY + STILL + "[stages.vae]\nsteps = 1\nbatch = 2\n")
    start = f'[init]\nvae = "{emoji}"\nunet = "{emoji}"\n'
    things = train(tmp_path / "things", TINY + 'kind = "things"\n' + STILL + start)
    assert same(weights(AutoencoderKL, emoji, "vae"), weights(AutoencoderKL, things, "vae"))
    assert same(weights(UNet2DConditionModel, emoji, "unet"), weights(UNet2DConditionModel, things, "unet"))
    tokenizer = CLIPTokenizer.from_pretrained(things, subfolder="tokenizer")
    assert knows_whole(tokenizer, KINDS["things"].words)
    assert not knows_whole(CLIPTokenizer.from_pretrained(emoji, subfolder="tokenizer"), KINDS["things"].words)

    again = train(tmp_path / "again", TINY + 'kind = "things"\n' + STILL + start.replace(str(emoji), str(things)))
    assert same(weights(CLIPTextModel, things, "text_encoder"), weights(CLIPTextModel, again, "text_encoder"))
    assert CLIPTokenizer.from_pretrained(again, subfolder="tokenizer").get_vocab() == tokenizer.get_vocab()


def test_an_embedding_starts_from_what_its_word_means():
    torch.manual_seed(0)
    tokenizer = build_tokenizer(KINDS["things"].words)
    encoder = build_text_encoder(TrainConfig(), tokenizer)
    place_by_meaning(encoder, tokenizer, read_meanings())
    table = encoder.get_input_embeddings().weight.detach()
    of = lambda word: table[tokenizer(word).input_ids[1]]
    alike = lambda a, b: torch.cosine_similarity(of(a), of(b), dim=0).item()
    assert alike("dog", "cat") > alike("dog", "truck") + 0.1
    assert alike("dog", "cat") < 0.95
    assert table.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_configuration_chooses_its_world(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[world]\nkind = "things"\nsize = 32\nviews = 1')
    config = load_config(file)
    assert config.names == KINDS["things"].names
    assert "train" in config.unseen
    assert open_world(config.world, ["dog"]).render(2, torch.Generator()).images.shape == (2, 3, 32, 32)
    for text, message in {
        '[world]\nkind = "photographs"': "world.kind is 'photographs'; known: emoji, things",
        '[world]\nkind = "things"\nviews = -1': "counts",
        'names = ["unicorn"]\n[world]\nkind = "things"': "no sprite is known for unicorn",
        '[init]\nhead = "x"': r"unknown part head in \[init\]",
        '[init]\nunet = "nowhere"': "init.unet is nowhere, which holds no unet",
    }.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_config(file)
