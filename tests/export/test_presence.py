"""A bundle that tells presence: parity with torch, and the way of a score from the graph into every record."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.quick import PROMPTS, QUICK, drawn, drawn_by_device
from helpers.tiny import smaller

from grounded_diffusion.bundle import GRAPH_IO, PRESENCE, TELLS_PRESENCE, UNET_GROUNDED, open_bundle
from grounded_diffusion.engine import Filters, GroundedPipeline, RunConfig, make_dataset
from grounded_diffusion.engine.cli import infer
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.bundle import export_bundle
from grounded_diffusion.export.graphs import trace
from grounded_diffusion.export.verify import check_graphs
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.generator.text import template_states
from grounded_diffusion.training.head.presence import Presence
from grounded_diffusion.training.head.queried import cross_attentions


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    """A small model, which takes some names for present and others not."""
    model = smaller(load_checkpoint(tiny_checkpoint))
    template = template_states(model.tower, model.tokenizer, model.query_template)
    torch.manual_seed(0)
    presence = Presence.of(model.unet, template, model.head.config.embed_dim, cross_attentions(model.unet)[1:3])
    for cells in presence.bank:
        cells.normal_()
    return replace(model, presence=presence)


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("presence") / "bundle"
    export_bundle(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def samples(bundle):
    return drawn(bundle)


def test_every_graph_equals_its_module(checkpoint, bundle):
    rows = check_graphs(checkpoint, bundle)
    told = [row for row in rows if row.what.endswith(PRESENCE)]
    assert len(told) == 4  # of the standard graph, the CPU's, the GPU's and OpenVINO's
    assert max(row.value for row in rows) < 1e-5


def test_the_manifest_says_so(checkpoint, bundle):
    opened = open_bundle(bundle)
    assert opened.tells_presence
    assert opened.manifest.head[TELLS_PRESENCE] == [name for name, _, _ in checkpoint.presence.config.layers]
    assert list(opened.outputs(UNET_GROUNDED)) == [*GRAPH_IO[UNET_GROUNDED][1], PRESENCE]


def test_a_bundle_without_it_tells_nothing(tiny_bundle):
    assert not open_bundle(tiny_bundle).tells_presence
    with GroundedPipeline.open(tiny_bundle, threads=1) as pipe:
        (sample,) = pipe.generate(["a [dog]"], QUICK)
    assert sample.objects[0].presence is None


def test_in_half_precision_it_stays_in_single(checkpoint):
    model = trace(checkpoint, UNET_GROUNDED, "fp16")
    types = {value.name: value.dtype.name for value in model.graph.outputs}
    assert types == {"model_output": "FLOAT16", "mask_logits": "FLOAT", PRESENCE: "FLOAT"}


def test_every_object_has_a_probability(samples):
    told = [thing.presence for sample in samples for thing in sample.objects]
    assert len(told) == 3
    assert all(0 < value < 1 for value in told)
    assert len(set(told)) == 3


def test_it_hangs_on_the_object_alone(bundle, samples):
    """Not on the images of its batch, nor on how many objects are padded beside it."""
    alone = drawn(bundle, batch=1)
    for one, other in zip(alone, samples, strict=True):
        assert [thing.presence for thing in one.objects] == pytest.approx(
            [thing.presence for thing in other.objects], abs=1e-5
        )


def test_the_device_loop_tells_the_same(bundle, samples):
    found = drawn_by_device(bundle)
    for one, other in zip(found, samples, strict=True):
        assert [thing.presence for thing in one.objects] == pytest.approx(
            [thing.presence for thing in other.objects], abs=1e-5
        )


def test_openvino_tells_the_same(bundle, samples):
    pytest.importorskip("openvino")
    found = drawn(bundle, "openvino")
    for one, other in zip(found, samples, strict=True):
        assert [thing.presence for thing in one.objects] == pytest.approx(
            [thing.presence for thing in other.objects], abs=1e-3
        )


def test_every_record_has_it(bundle, samples, tmp_path):
    config = RunConfig(prompts=PROMPTS, out=tmp_path / "out", model=bundle, options=QUICK, threads=1, lanes=1)
    make_dataset(config)
    records = list(FolderDataset(tmp_path / "out"))
    expected = [[round(thing.presence, 4) for thing in sample.objects] for sample in samples]
    assert [[thing.presence for thing in record.objects] for record in records] == expected
    rows = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [[thing["presence"] for thing in row["objects"]] for row in rows] == expected


def test_what_is_not_there_is_refused(bundle, samples, tmp_path):
    told = sorted(min(thing.presence for thing in sample.objects) for sample in samples)
    limit = float(np.mean(told))
    options = ["--model", bundle, "--steps", 3, "--sampler", "ddim", "--batch", 2, "--threads", 1, "--lanes", 1]
    for prompt in PROMPTS:
        options += ["--prompt", prompt]
    words = [*options, "--min-presence", limit, "--attempts", 1, "--out", tmp_path / "out"]
    assert infer.main([str(word) for word in words]) == infer.LOST
    assert json.loads((tmp_path / "out/summary.json").read_text())["rejected"] == 1


def test_a_model_that_tells_nothing_has_no_such_filter(tiny_bundle, tmp_path):
    config = RunConfig(
        prompts=["a [dog]"], out=tmp_path / "out", model=tiny_bundle, options=QUICK, filters=Filters(min_presence=0.5)
    )
    with pytest.raises(UsageError, match="does not tell presence"):
        make_dataset(config)


def test_the_settings_of_other_runs_stay_as_they_were(bundle, tmp_path):
    config = RunConfig(prompts=PROMPTS, out=tmp_path / "out", model=bundle, options=QUICK, threads=1, lanes=1)
    make_dataset(config)
    assert "min_presence" not in json.loads((tmp_path / "out/run.json").read_text())["settings"]
