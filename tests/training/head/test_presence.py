"""Whether an object is there: the attention that is read, the regression, and that nothing of the head changes."""

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.checkpoint import HEAD, PRESENCE, load_checkpoint, save_checkpoint
from grounded_diffusion.training.generator.text import object_queries, template_states
from grounded_diffusion.training.head.attention import cross_attentions
from grounded_diffusion.training.head.presence import Presence, PresenceConfig, calibrate


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def presence(model):
    """Of two layers, with weights that matter."""
    template = template_states(model.tower, model.tokenizer, model.query_template)
    made = Presence.of(model.unet, template, cross_attentions(model.unet)[:2])
    made.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.25]))
    made.bias.fill_(0.3)
    return made


def call(model, presence, batch=2, names=("dog", "cat", "unicorn")):
    """(tapped, logits, queries) of random latents."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 16, 16, generator=g)
    queries = object_queries(model.tower, model.tokenizer, model.query_template, names).expand(batch, -1, -1)
    with torch.no_grad(), presence.taps(model.unet) as taps:
        context = torch.randn(2 * batch, 77, 32, generator=g)
        model.unet(latents.repeat(2, 1, 1, 1), torch.ones(2 * batch), context)
    return taps.raw(), torch.randn(batch, len(names), 16, 16, generator=g), queries


def by_hand(model, layer, image, template, query):
    """The share of one query at every cell, with torch's own attention on one word list."""
    attention = model.unet.get_submodule(layer)
    words = attention.to_k(torch.cat([template, query[None]]))  # [T+1,C]
    share = 0
    for head in range(attention.heads):
        part = slice(head * words.shape[1] // attention.heads, (head + 1) * words.shape[1] // attention.heads)
        scores = image[:, part] @ words[:, part].T * attention.scale
        share = share + scores.softmax(-1)[:, -1] / attention.heads
    return share


def test_a_share_is_that_of_attention_to_the_template_and_the_name(model, presence):
    tapped, _, queries = call(model, presence)
    for k, (layer, _, _) in enumerate(presence.config.layers):
        found = presence.shares(k, tapped, queries)
        image = tapped[f"{layer}.to_q"][2:]  # the conditional half
        expected = by_hand(model, layer, image[1], presence.template, queries[1, 2])
        assert torch.allclose(found[1, 2].flatten(), expected, atol=1e-6)


def test_objects_do_not_influence_one_another(model, presence):
    tapped, logits, queries = call(model, presence)
    alone = presence(tapped, logits[:, 1:2], queries[:, 1:2])
    assert torch.allclose(presence(tapped, logits, queries)[:, 1:2], alone, atol=1e-5)


def test_images_of_a_batch_do_not_influence_one_another(model, presence):
    tapped, logits, queries = call(model, presence)
    rows = {name: value[[1, 3]] for name, value in tapped.items()}  # both halves of the second image
    assert torch.allclose(presence(rows, logits[1:], queries[1:]), presence(tapped, logits, queries)[1:], atol=1e-5)


def test_what_is_certain_is_learnt():
    torch.manual_seed(0)
    presence = Presence(PresenceConfig((("a.attn2", 1, 4),), 3, 4))
    present = torch.arange(400) % 4 == 0  # one of four
    evidence = torch.randn(400, 2) + torch.where(present, 3.0, 0.0)[:, None] * torch.tensor([1.0, 0.0])
    calibrate(presence, evidence, present)
    said = evidence @ presence.weight + presence.bias
    assert ((said > 0) == present).float().mean() > 0.9
    assert presence.weight[0] > 4 * presence.weight[1].abs()
    # At even odds: as often wrong about the present as about the absent.
    kept, left_out = (said[present] > 0).float().mean().item(), (said[~present] < 0).float().mean().item()
    assert kept == pytest.approx(left_out, abs=0.06)


def test_one_kind_alone_cannot_be_calibrated_on():
    presence = Presence(PresenceConfig((("a.attn2", 1, 4),), 3, 4))
    with pytest.raises(UsageError, match="give both"):
        calibrate(presence, torch.randn(4, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(UsageError, match="needs a cross-attention"):
        PresenceConfig((), 3, 4)


def test_a_checkpoint_keeps_it(model, presence, tmp_path):
    from dataclasses import replace

    save_checkpoint(tmp_path / "with", replace(model, presence=presence))
    back = load_checkpoint(tmp_path / "with")
    assert back.presence.config == presence.config
    tapped, logits, queries = call(model, presence)
    expected = presence(tapped, logits, queries).numpy()
    assert np.allclose(back.presence(tapped, logits, queries).numpy(), expected, atol=2e-2)  # keys in FP16
    save_checkpoint(tmp_path / "without", model)
    assert load_checkpoint(tmp_path / "without").presence is None
    (tmp_path / "with" / HEAD / PRESENCE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(tmp_path / "with")
