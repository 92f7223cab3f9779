"""Every graph of the shipped model, in FP16, parses and builds with TensorRT-RTX on a machine without a GPU."""

import pytest

from grounded_diffusion.bundle import GPU_GRAPHS, UNET, open_bundle
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket
from grounded_diffusion.engine.backends.tensorrt.store import load_plan
from grounded_diffusion.engine.pipeline.shipped import shipped_checkpoint
from grounded_diffusion.export.engines import build_engines


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model's bundle in FP16."""
    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("shipped") / "bundle"
    export_bundle(load_checkpoint(shipped_checkpoint()), path, precision="fp16")
    return open_bundle(path)


@pytest.mark.parametrize("graph", GPU_GRAPHS)
def test_it_builds(shipped, graph):
    (spec,) = build_engines(shipped, "tensorrt_rtx", sms=[120], buckets=[Bucket(1)], graphs=[graph])
    assert spec.precision == "fp16"
    assert len(load_plan(shipped.path, spec)) > 100_000
    if graph == UNET:
        assert spec.shapes["latents"][0] == 1  # both halves of guidance see the same
        assert {shape[0] for name, shape in spec.shapes.items() if name.startswith("context")} == {2}
