"""Whether an object is there: the attention that is read, the regression, and that nothing of the head changes."""

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model
from torch.nn import functional as F

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.checkpoint import HEAD, PRESENCE, load_checkpoint, save_checkpoint
from grounded_diffusion.training.generator.text import object_queries, template_states
from grounded_diffusion.training.head.presence import Presence, PresenceConfig, calibrate
from grounded_diffusion.training.head.queried import cross_attentions

STATE = 6  # width of an object's state


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def presence(model):
    """Of two layers, with random weights and cells."""
    torch.manual_seed(3)
    template = template_states(model.tower, model.tokenizer, model.query_template)
    made = Presence.of(model.unet, template, STATE, cross_attentions(model.unet)[:2])
    for cells in made.bank:
        cells.normal_()
    return made


def call(model, presence, batch=2, names=("dog", "cat", "unicorn")):
    """(tapped, logits, queries, states) of random latents."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 16, 16, generator=g)
    queries = object_queries(model.tower, model.tokenizer, model.query_template, names).expand(batch, -1, -1)
    with torch.no_grad(), presence.taps(model.unet) as taps:
        context = torch.randn(2 * batch, 77, 32, generator=g)
        model.unet(latents.repeat(2, 1, 1, 1), torch.ones(2 * batch), context)
    logits = torch.randn(batch, len(names), 16, 16, generator=g)
    return taps.raw(), logits, queries, torch.randn(batch, len(names), STATE, generator=g)


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
    tapped, _, queries, _ = call(model, presence)
    for k, (layer, _, _) in enumerate(presence.config.layers):
        (found,) = presence.shares(k, queries, presence.image_queries(k, tapped))
        image = tapped[f"{layer}.to_q"][2:]  # the conditional half
        expected = by_hand(model, layer, image[1], presence.template, queries[1, 2])
        assert torch.allclose(found[1, 2], expected, atol=1e-6)


@pytest.mark.parametrize("shift", [0, -16], ids=["a mask", "a nearly empty one"])
def test_evidence_is_the_share_inside_outside_and_elsewhere_and_the_state(model, presence, shift):
    tapped, logits, queries, states = call(model, presence)
    logits = logits + shift
    evidence = presence.evidence(tapped, logits, queries, states)[1, 2]
    assert torch.equal(evidence[-STATE:], states[1, 2])
    layer = presence.config.layers[0][0]
    share = by_hand(model, layer, tapped[f"{layer}.to_q"][3], presence.template, queries[1, 2])
    side = round(len(share) ** 0.5)
    share = F.interpolate(share.view(1, 1, side, side), (16, 16), mode="bilinear")[0, 0]
    inside = logits[1, 2].sigmoid()
    elsewhere = by_hand(model, layer, presence.bank[0], presence.template, queries[1, 2]).mean()
    means = (share * inside).sum() / inside.sum(), (share * (1 - inside)).sum() / (1 - inside).sum(), elsewhere
    assert torch.allclose(evidence[:3], torch.stack(means).logit(), atol=1e-5)


def test_objects_do_not_influence_one_another(model, presence):
    tapped, logits, queries, states = call(model, presence)
    alone = presence(tapped, logits[:, 1:2], queries[:, 1:2], states[:, 1:2])
    assert torch.allclose(presence(tapped, logits, queries, states)[:, 1:2], alone, atol=1e-5)


def test_images_of_a_batch_do_not_influence_one_another(model, presence):
    tapped, *given = call(model, presence)
    rows = {name: value[[1, 3]] for name, value in tapped.items()}  # both halves of the second image
    second = presence(rows, *(value[1:] for value in given))
    assert torch.allclose(second, presence(tapped, *given)[1:], atol=1e-5)


def test_what_is_certain_is_learnt():
    """From a share, or from the state; and from a share alone where a name's state says nothing."""
    presence = Presence(PresenceConfig((("a.attn2", 1, 4),), 3, 4, STATE))
    present = torch.arange(1200) % 4 == 0  # one of four
    torch.manual_seed(0)
    evidence = torch.randn(1200, 3 + STATE)
    evidence[:, [0, 5]] += torch.where(present, 4.0, 0.0)[:, None]
    calibrate(presence, evidence, present)
    said = presence.classify(evidence)
    assert ((said > 0) == present).float().mean() > 0.95
    unknown = evidence.clone()
    unknown[:, 3:] = presence.mean[3:]
    assert ((presence.classify(unknown) > 0) == present).float().mean() > 0.85
    first = [weight.clone() for weight in presence.parameters()]
    calibrate(presence, evidence, present)
    assert all(torch.equal(one, other) for one, other in zip(first, presence.parameters(), strict=True))
    # Objects are lost less often than strangers pass.
    lost, passed = (said[present] < 0).float().mean().item(), (said[~present] > 0).float().mean().item()
    assert lost <= passed < 0.05


def test_one_kind_alone_cannot_be_calibrated_on():
    presence = Presence(PresenceConfig((("a.attn2", 1, 4),), 3, 4, STATE))
    with pytest.raises(UsageError, match="give both"):
        calibrate(presence, torch.randn(4, 3 + STATE), torch.ones(4, dtype=torch.bool))
    with pytest.raises(UsageError, match="needs a cross-attention"):
        PresenceConfig((), 3, 4, STATE)


def test_a_checkpoint_keeps_it(model, presence, tmp_path):
    from dataclasses import replace

    save_checkpoint(tmp_path / "with", replace(model, presence=presence))
    back = load_checkpoint(tmp_path / "with")
    assert back.presence.config == presence.config
    given = call(model, presence)
    assert np.allclose(back.presence(*given).numpy(), presence(*given).numpy(), atol=2e-2)  # keys in FP16
    save_checkpoint(tmp_path / "without", model)
    assert load_checkpoint(tmp_path / "without").presence is None
    (tmp_path / "with" / HEAD / PRESENCE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot load"):
        load_checkpoint(tmp_path / "with")
