"""What a head reads of the UNet's cross-attention: of whom it hangs, and that a head without it is the old one."""

from dataclasses import replace

import pytest
import torch
from helpers.queried import with_attention_read
from helpers.tiny import tiny_model

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.checkpoint import load_checkpoint, save_checkpoint
from grounded_diffusion.training.generator.text import object_queries
from grounded_diffusion.training.head.folded import fold
from grounded_diffusion.training.head.head import GroundingHead
from grounded_diffusion.training.head.queried import cross_attentions

NAMES = ("dog", "cat", "unicorn")


@pytest.fixture(scope="module")
def model():
    return with_attention_read(tiny_model())


@pytest.fixture(scope="module")
def seen(model):
    """(raw taps, features, queries) of random latents."""
    g = torch.Generator().manual_seed(1)
    queries = object_queries(model.tower, model.tokenizer, model.query_template, NAMES).expand(2, -1, -1)
    with torch.no_grad(), model.head.taps(model.unet) as taps:
        context = torch.randn(4, 77, 32, generator=g)
        model.unet(torch.randn(2, 4, 16, 16, generator=g).repeat(2, 1, 1, 1), torch.ones(4), context)
    return taps.raw(), taps.features(), queries


def all_valid(queries):
    return torch.ones(queries.shape[:2], dtype=torch.bool)


def test_odds_are_of_the_name_alone_against_the_template(model, seen):
    """By torch's own softmax over the template's words and one name, head by head."""
    raw, _, queries = seen
    evidence = model.head.evidence
    for k, (name, heads, channels) in enumerate(evidence.layers):
        image = evidence.image_queries(k, raw[-1])
        (odds,) = evidence.odds(k, queries, image)
        keys = model.unet.get_submodule(name).to_k(torch.cat([evidence.template, queries[1, 2][None]]))
        for head in range(heads):
            part = slice(head * channels // heads, (head + 1) * channels // heads)
            scores = image[1][:, part] @ keys[:, part].T * (channels // heads) ** -0.5
            assert torch.allclose(odds[1, head, :, 2].sigmoid(), scores.softmax(-1)[:, -1], atol=1e-5)


def test_every_layer_is_read_at_its_own_resolution(model, seen):
    evidence = model.head.evidence
    assert [name for name, _, _ in evidence.layers] == cross_attentions(model.unet)
    assert {evidence.place(k, seen[0][-1])[0] for k in range(len(evidence.layers))} == {4, 8}


def test_it_tells_the_head_something(model, seen):
    _, features, queries = seen
    plain = GroundingHead(replace(model.head.config, attention=(), words=0)).eval()
    plain.load_state_dict(model.head.state_dict(), strict=False)
    with torch.no_grad():
        without = plain(features[:-1], queries, all_valid(queries))
        told = model.head(features, queries, all_valid(queries))
    assert without.shape == told.shape
    assert not torch.allclose(without, told, atol=1e-3)


def test_an_object_has_its_own_evidence(model, seen):
    raw, features, queries = seen
    fused = model.head.encode(features[:-1])
    turned = torch.tensor([2, 0, 1])
    with torch.no_grad():
        logits, looks = model.head.evidence(raw[-1], queries, fused)
        other, looked = model.head.evidence(raw[-1], queries[:, turned], fused)
    assert torch.allclose(other, logits[:, turned], atol=1e-5)
    assert torch.allclose(looked, looks[:, turned], atol=1e-5)
    assert not torch.allclose(logits[:, 0], logits[:, 1], atol=1e-3)


def test_padding_changes_nothing(model, seen):
    _, features, queries = seen
    valid = all_valid(queries)
    valid[:, 2] = False
    with torch.no_grad():
        alone = model.head(features, queries[:, :2], valid[:, :2])
        padded = model.head(features, queries, valid)
    assert torch.allclose(padded[:, :2], alone, atol=1e-5)


def test_the_folded_head_is_the_same(model, seen):
    raw, features, queries = seen
    with torch.no_grad():
        plain = model.head.with_states(features, queries, all_valid(queries))
        folded = fold(model.head).with_states(raw, queries, all_valid(queries))
    for one, other in zip(plain, folded, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_checkpoint_keeps_it(model, seen, tmp_path):
    save_checkpoint(tmp_path / "it", model, torch.float32)
    again = load_checkpoint(tmp_path / "it")
    assert again.head.config == model.head.config
    _, features, queries = seen
    with torch.no_grad():
        assert torch.equal(
            again.head(features, queries, all_valid(queries)), model.head(features, queries, all_valid(queries))
        )
    assert again.head.about()["attention"] == cross_attentions(model.unet)


def test_a_head_of_another_unet_is_refused(model, tmp_path):
    layers = tuple((name.replace("mid_block", "end_block"), h, c) for name, h, c in model.head.config.attention)
    head = GroundingHead(replace(model.head.config, attention=layers))
    save_checkpoint(tmp_path / "it", replace(model, head=head))
    with pytest.raises(CheckpointError, match="made for another UNet"):
        load_checkpoint(tmp_path / "it")


def test_a_head_that_reads_nothing_has_no_more_weights_than_before():
    head = tiny_model().head
    assert head.evidence is None
    assert not [name for name in head.state_dict() if name.startswith("evidence")]


def test_a_template_and_layers_go_together(model):
    with pytest.raises(UsageError, match="words of a template"):
        replace(model.head.config, words=0)
    with pytest.raises(UsageError, match="words of a template"):
        replace(model.head.config, attention=())
