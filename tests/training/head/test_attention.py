"""Masks without training: the attention it reads, what influences a mask, and which layers it chooses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model

from grounded_diffusion.engine.pipeline.shipped import shipped_checkpoint
from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.checkpoint import load_checkpoint, with_attention
from grounded_diffusion.training.generator.attention import calibrated
from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.head.attention import AttentionConfig, AttentionHead

LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    tiny = tiny_model()
    tiny.unet.requires_grad_(False)
    return tiny


@pytest.fixture(scope="module")
def head(model):
    """A head of one layer that finds something in any image."""
    config = AttentionConfig(((LAYER, 1.0),), ("up_blocks.1", "up_blocks.2"), presence=0.0, floor=0.0, alone=-100.0)
    generator = torch.Generator().manual_seed(1)
    return AttentionHead(config, model.unet, torch.randn(3, 32, generator=generator), model.latent_size)


def tapped(model, head, batch: int = 2):
    """What a call gives the head, and queries [batch,2,D]."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    with head.taps(model.unet) as taps, torch.no_grad():
        model.denoiser(draw(2 * batch, 4, 16, 16), torch.full((2 * batch,), 121.0), draw(2 * batch, 77, 32))
    return taps.features(), draw(batch, 2, 32)


def test_shares_are_a_layer_s_own_attention(model, head):
    """The same as the layer's weights when its context is the template and the objects."""
    features, queries = tapped(model, head)
    image = head.image_queries(0, features)
    shares, odds = head.shares(0, image, queries, torch.ones(2, 2, dtype=torch.bool))
    attention = model.unet.get_submodule(LAYER)
    for b in range(2):
        keys = attention.to_k(torch.cat([head.template, queries[b]]))  # [T+O,C]
        per_head = [
            (image[b][:, part] @ keys[:, part].T / (part.stop - part.start) ** 0.5).softmax(-1)
            for part in (slice(i * 16, i * 16 + 16) for i in range(attention.heads))
        ]
        expected = torch.stack(per_head).mean(0)[:, len(head.template) :].T
        assert torch.allclose(shares[b], expected, atol=1e-6)
    for o in range(2):
        _, lone = head.shares(0, image, queries[:, o : o + 1], torch.ones(2, 1, dtype=torch.bool))
        assert torch.allclose(odds[:, o], lone[:, 0], atol=1e-5)
        b, weights = 1, [(h[..., -2 + o] / h[..., :-2].sum(-1)).log() for h in per_head]  # of the last image
        assert torch.allclose(odds[b, o], torch.stack(weights).mean(0), atol=1e-4)


def test_only_the_conditional_half_is_read(model, head):
    features, queries = tapped(model, head)
    valid = torch.ones(2, 2, dtype=torch.bool)
    other = {name: torch.cat([value[:2] * 0 - 3, value[2:]]) for name, value in features.items()}
    assert torch.equal(head(features, queries, valid), head(other, queries, valid))


def test_padding_influences_nothing(model, head):
    features, queries = tapped(model, head)
    valid = torch.tensor([[True, False], [True, True]])
    alone = head(features, queries[:, :1], valid[:, :1])
    padded = head(features, queries, valid)
    assert torch.allclose(padded[0, 0], alone[0, 0], atol=1e-5)
    assert not torch.allclose(padded[1, 0], alone[1, 0], atol=1e-3)


def test_an_image_does_not_see_its_neighbours(model, head):
    features, queries = tapped(model, head)
    valid = torch.ones(2, 2, dtype=torch.bool)
    both = head(features, queries, valid)
    second = {name: value[1::2] for name, value in features.items()}
    assert torch.allclose(both[1:], head(second, queries[1:], valid[1:]), atol=1e-5)


def test_what_is_inside(model, head):
    """Above half of the highest share; nothing where the highest is below the presence."""
    features, queries = tapped(model, head)
    valid = torch.ones(2, 2, dtype=torch.bool)
    inside = (head(features, queries, valid) > 0).float().mean()
    assert 0 < inside <= 1
    strict = AttentionHead(replace(head.config, presence=0.999), model.unet, head.template, model.latent_size)
    assert not (strict(features, queries, valid) > 0).any()


def test_what_is_there_at_all(model, head):
    """Only what is strong against the template alone, on a patch of a 64th of the image, is in it."""
    features, queries = tapped(model, head)
    valid = torch.ones(2, 2, dtype=torch.bool)
    assert head.patch == 2
    _, odds = head.maps(features, queries, valid, (16, 16))
    patches = [odds[..., y : y + 2, x : x + 2].mean((2, 3)) for y in range(15) for x in range(15)]
    strongest = torch.stack(patches).amax(0)  # [B,O]
    assert torch.allclose(head.strongest(odds)[..., 0], strongest, atol=1e-6)
    between = strongest.flatten().sort().values[1:3].mean().item()
    strict = AttentionHead(replace(head.config, alone=between), model.unet, head.template, model.latent_size)
    found = (strict(features, queries, valid) > 0).flatten(2).any(2)
    assert torch.equal(found, strongest > between)


def test_thresholds_are_lower_where_a_model_s_own_nouns_are_weak(model, head):
    features, queries = tapped(model, head)
    taps = head.taps(model.unet)
    taps.features = lambda: features
    assert calibrated(head, taps, queries[:, :1]) == head.config
    strict = AttentionHead(replace(head.config, alone=50.0, floor=0.5), model.unet, head.template, model.latent_size)
    config = calibrated(strict, taps, queries[:, :1])
    _, odds = head.maps(features, queries[:, :1], torch.ones(2, 1, dtype=torch.bool), (16, 16))
    assert config.alone == pytest.approx(head.strongest(odds).median().item() - 0.5, abs=1e-4)
    assert config.floor == pytest.approx(0.5 / (1 + np.exp(-config.alone)), abs=1e-4)


def test_a_unet_without_cross_attention_is_refused():
    with pytest.raises(UsageError, match="needs a cross-attention layer"):
        AttentionConfig((), ("up_blocks.0",))


def test_layers_are_found_without_labels():
    """On the shipped model those two whose maps agree with its segmenter, whatever nouns are drawn."""
    checkpoint = with_attention(load_base(shipped_checkpoint()))
    layers = dict(checkpoint.head.config.layers)
    assert layers.keys() == {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    }
    assert sum(layers.values()) == pytest.approx(1, abs=1e-3)
    assert checkpoint.capture_timestep == 121


def test_a_checkpoint_s_trained_head_may_be_left_out(tiny_checkpoint):
    checkpoint = load_checkpoint(tiny_checkpoint, head="attention")
    assert checkpoint.head.about()["variant"] == "attention"
    assert checkpoint.names == dict(seen=["dog", "cat"], unseen=["unicorn"])
    assert load_checkpoint(None, tiny_checkpoint).head.about()["variant"] == "attention"
    with pytest.raises(UsageError, match="is a trained head; leave out --ckpt"):
        load_checkpoint(tiny_checkpoint / "grounding_head" / "model.safetensors", tiny_checkpoint, head="attention")
