"""Equal modules are traced once a session, and no other is taken for them. See helpers/traces.py."""

import pytest
import torch
from helpers.tiny import tiny_model
from helpers.traces import digest

from grounded_diffusion.bundle import GRAPHS, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.export.graphs import MODULES, rowwise, swapped
from grounded_diffusion.training.checkpoint import with_statistics


def key(model, graph):
    return digest(model, graph, MODULES[graph](model).eval())


@pytest.fixture
def model():
    return tiny_model()


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_same_model_made_again_has_the_same(model, graph):
    assert key(model, graph) == key(tiny_model(), graph)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_changed_weight_tells(model, graph):
    before = key(model, graph)
    with torch.no_grad():
        for part in (model.unet, model.vae, model.text_encoder):
            list(part.parameters())[-1].view(-1)[0] += 1
    assert key(model, graph) != before


def test_another_head_and_other_norms_tell(model):
    assert key(with_statistics(model, "stored"), UNET_GROUNDED) != key(model, UNET_GROUNDED)
    module = MODULES[VAE_DECODER](model).eval()
    assert digest(model, VAE_DECODER, swapped(module, rowwise)) != digest(model, VAE_DECODER, module)


def test_a_scale_tells(model):
    before = key(model, VAE_DECODER)
    model.vae.register_to_config(scaling_factor=0.25)
    assert key(model, VAE_DECODER) != before
