"""Presence from examples: negative queries, what is left out, and gd-train head --presence."""

import pytest
import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training import cli
from grounded_diffusion.training.checkpoint import load_checkpoint, untrained_checkpoint
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.generator.text import template_states
from grounded_diffusion.training.grounding.batches import inputs_of
from grounded_diffusion.training.grounding.presence import (
    NEGATIVES,
    fill_bank,
    fit_presence,
    gather,
    strangers,
)
from grounded_diffusion.training.grounding.store import ExampleSet
from grounded_diffusion.training.head.presence import CELLS, Presence

SEEN = ("dog", "cat", "tv monitor")
HEAD = "[head]\nembed_dim = 32\nheads = 2\nffn_dim = 32\npatch = 2\nreduced_channels = [8, 16]\n"


@pytest.fixture(scope="module")
def model(base):
    return FrozenBase(base)


@pytest.fixture(scope="module")
def found(examples):
    one = ExampleSet(examples)
    return [one[k] for k in range(len(one))]


def test_strangers_are_not_in_the_image():
    names = [f"name {k}" for k in range(10)]
    for place in range(20):
        asked = strangers(names[:2], names, place, 3)
        assert len(set(asked)) == 3
        assert not set(asked) & set(names[:2])
    assert len({tuple(strangers([], names, place, 3)) for place in range(20)}) > 5
    assert strangers(names, names, 0, 3) == []


def test_every_image_gives_its_names_and_others(model, found):
    head = untrained_checkpoint(model.source).head
    template = template_states(model.with_head(head).tower, model.tokenizer, model.template)
    presence = Presence.of(model.unet, template, head.config.embed_dim)
    evidence, present = gather(model, head, presence, found, SEEN)
    assert evidence.shape == (len(present), 3 * len(presence.config.layers) + head.config.embed_dim)
    assert present.sum() == len(NEGATIVES) * sum(mask.any() for example in found for mask in example.masks)
    assert (~present).sum() == sum(min(count, 3 - len(example.names)) for example in found for count in NEGATIVES)
    assert torch.isfinite(evidence).all()
    with pytest.raises(UsageError, match="there are none"):
        gather(model, head, presence, found, ["deer"])


def test_fitting_changes_neither_head_nor_model(model, found):
    head = untrained_checkpoint(model.source).head
    before = {name: value.clone() for name, value in head.state_dict().items()}
    presence, told = fit_presence(model, head, found, SEEN)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert 0 <= told.passed <= 1
    assert told.kept >= told.passed  # on its own data it is no worse than chance
    assert "are kept" in told.line()
    again, _ = fit_presence(model, head, found, SEEN)
    assert all(map(torch.equal, again.state_dict().values(), presence.state_dict().values()))


def test_the_bank_has_cells_of_all_images(model, found):
    head = untrained_checkpoint(model.source).head
    template = template_states(model.with_head(head).tower, model.tokenizer, model.template)
    presence = Presence.of(model.unet, template, head.config.embed_dim)
    fill_bank(model, presence, found)
    for layer, cells in enumerate(presence.bank):
        assert len(torch.unique(cells, dim=0)) > CELLS / 3  # of few images some are taken twice
        latents, timesteps = inputs_of(found[:1])
        with presence.taps(model.unet) as taps:
            model.call(latents, [found[0].prompt], timesteps)
        image = presence.image_queries(layer, taps.raw())[0]
        each = -(-CELLS // len(found))
        assert (torch.cdist(cells[:each], image).amin(1) < 1e-2).all()


def test_gd_train_head_presence_writes_it(base, examples, tmp_path, capsys):
    (tmp_path / "head.toml").write_text(HEAD)
    options = ["--base", base, "--examples", examples, "--iterations", 2, "--batch", 4, "--validate-every", 0]
    out = ["--config", tmp_path / "head.toml", "--device", "cpu", "--out", tmp_path / "out"]
    words = [str(word) for word in ("head", *options, *out)]
    assert cli.main(words) == 0
    assert load_checkpoint(tmp_path / "out").presence is None
    assert cli.main([*words, "--presence"]) == 0
    assert "of names that are there are kept" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out").presence is not None
