"""A head that reads cross-attention, in every form of the graphs and on every backend: the masks are the same."""

import numpy as np
import pytest
from helpers.queried import with_attention_read
from helpers.quick import drawn, drawn_by_device
from helpers.tiny import smaller

from grounded_diffusion.bundle import UNET_GROUNDED, open_bundle
from grounded_diffusion.export.bundle import export_bundle
from grounded_diffusion.export.verify import check_graphs, check_loop
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.head.queried import cross_attentions


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return with_attention_read(smaller(load_checkpoint(tiny_checkpoint)))


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("queried") / "bundle"
    export_bundle(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def samples(bundle):
    return drawn(bundle)


def same_logits(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.mask_logits - other.mask_logits).max() < tolerance * np.abs(other.mask_logits).max()


def test_every_graph_equals_its_module(checkpoint, bundle):
    rows = check_graphs(checkpoint, bundle)
    assert len([row for row in rows if row.what.endswith(f"{UNET_GROUNDED} mask_logits")]) == 4
    assert max(row.value for row in rows) < 1e-5


def test_the_whole_loop_equals_diffusers(checkpoint, bundle):
    assert all(row.passed for row in check_loop(checkpoint, bundle))


def test_in_half_precision_it_is_as_near_as_any_graph(checkpoint, tmp_path):
    export_bundle(checkpoint, tmp_path / "bundle", precision="fp16")
    assert all(row.passed for row in check_graphs(checkpoint, tmp_path / "bundle"))


def test_the_manifest_says_so(checkpoint, bundle):
    assert open_bundle(bundle).manifest.head["attention"] == cross_attentions(checkpoint.unet)


def test_the_device_loop_draws_the_same(bundle, samples):
    same_logits(drawn_by_device(bundle), samples, 1e-4)


def test_openvino_draws_the_same(bundle, samples):
    pytest.importorskip("openvino")
    same_logits(drawn(bundle, "openvino"), samples, 1e-3)
