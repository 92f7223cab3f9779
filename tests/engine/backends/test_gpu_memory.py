"""What a batch needs of a GPU's memory is known before it is made."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers.fake_gpu import HostDevice, HostRuntime

from grounded_diffusion.bundle import GPU, UNET, open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.gpu.backend import OBJECTS, DeviceBackend
from grounded_diffusion.engine.backends.gpu.memory import loop_bytes
from grounded_diffusion.engine.backends.gpu.needs import counted_memory, sizes_of
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.engine.runs.estimate import estimate
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.stop import Stop

SIZE = (64, 64)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


def on_device(bundle, memory=1 << 40):
    device = HostDevice(memory)
    return DeviceBackend(bundle, device, HostRuntime(bundle, device))


def test_a_loop_allocates_what_was_counted(bundle):
    """But for the mask logits, whose size a bundle does not say: they are counted at the latents' size."""
    backend = on_device(bundle)
    with GroundedPipeline(bundle, backend) as pipe:
        list(pipe.generate(["a [dog]"] * 2, steps=1, batch=2, sampler="ddim"))
        (sizes,) = backend._loops
        assert sizes == sizes_of(bundle, 2, OBJECTS, SIZE)
        assert backend.device.used == pytest.approx(loop_bytes(bundle, sizes), rel=0.2)


def test_weights_and_activations_are_counted(bundle):
    need = lambda batch, size=SIZE: counted_memory(bundle, GPU, sizes_of(bundle, batch, OBJECTS, size))
    own = lambda batch, size=SIZE: loop_bytes(bundle, sizes_of(bundle, batch, OBJECTS, size))
    counted = bundle.manifest.memory
    weights = sum(weights for weights, _ in counted.values()) + counted[f"{GPU}{UNET}"][0]
    assert sum(weights for weights, _ in counted.values()) > 10_000
    assert need(1) > weights + own(1)
    growth = [need(batch) - own(batch) for batch in (1, 2, 3)]
    assert growth[2] - growth[1] == pytest.approx(growth[1] - growth[0], rel=0.01)
    assert need(1, (128, 64)) - own(1, (128, 64)) - weights == pytest.approx(2 * (need(1) - own(1) - weights), rel=0.01)


def test_a_bundle_that_does_not_say_is_not_guessed_at(bundle):
    older = replace(bundle, manifest=replace(bundle.manifest, memory={}))
    backend = on_device(older)
    assert backend.memory(4, SIZE) is None
    backend.close()


def test_a_batch_is_chosen_that_fits(bundle):
    roomy = on_device(bundle)
    with GroundedPipeline(bundle, roomy) as pipe:
        assert pipe.batch_size(Options()) == 16
    tight = on_device(bundle, roomy.runtime.memory(sizes_of(bundle, 5, OBJECTS, SIZE)))
    with GroundedPipeline(bundle, tight) as pipe:
        assert pipe.batch_size(Options()) == 4
        list(pipe.generate(["a [dog]"] * 2, steps=1, sampler="ddim", batch=2))
        assert pipe.batch_size(Options()) == 4, "what a run holds it can give back"
        assert pipe.batch_size(Options(batch=9)) == 9, "what was asked for is tried"


@pytest.mark.parametrize(
    ("batch", "says"), [(2, r"; \S+ GB are free$"), (8, ": too many, a smaller --batch is needed$")]
)
def test_a_dry_run_tells_it(bundle, tmp_path, monkeypatch, batch, says):
    backend = on_device(bundle, counted_memory(bundle, GPU, sizes_of(bundle, 4, OBJECTS, SIZE)))
    monkeypatch.setattr("grounded_diffusion.engine.runs.open.open_backend", lambda *_, **__: backend)
    options = Options(steps=1, batch=batch, sampler="ddim")
    prompts = ["a [dog] and a [cat]"] * 2
    config = RunConfig(prompts=prompts, out=tmp_path / "out", model=bundle.path, options=options, backend="cuda")
    run = open_run(config, lambda line: None, Stop(), quick=True)
    with run.pipe:
        found = estimate(run)
    assert found.memory.needed == backend.runtime.memory(sizes_of(bundle, batch, OBJECTS, SIZE))
    (line,) = (line for line in found.lines() if line.startswith("memory"))
    assert line.startswith(f"memory   a batch of {batch} needs about ")
    assert re.search(says, line)


def test_a_cpu_says_nothing_of_memory(tiny_bundle):
    with GroundedPipeline.open(tiny_bundle, threads=1) as pipe:
        assert pipe.backend.memory(16, SIZE) is None
