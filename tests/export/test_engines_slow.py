"""Engines of Stable Diffusion 1.5's sizes, in FP16 at 512x512, are built on a machine without a GPU within 16 GB."""

import os
import subprocess
import sys

import pytest
from helpers.plans import fused_attentions

from grounded_diffusion.bundle import CUDA, GPU, GPU_GRAPHS, UNET, open_bundle
from grounded_diffusion.engine.backends.gpu.backend import OBJECTS
from grounded_diffusion.engine.backends.gpu.needs import counted_memory, sizes_of
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, engine_spec
from grounded_diffusion.engine.backends.tensorrt.store import load_plan, read_sidecar

LIMIT = 16e9  # bytes
ATTENTIONS = 32  # 16 transformer blocks look at themselves and at the context
UNET_WEIGHTS = 2 * (859_520_964 - 19_169_280)  # bytes, without those of keys and values, 768 x 12480 and again


def export(*arguments: str) -> tuple[str, float]:
    """Run gd-export by itself: what it said, and its peak memory in bytes."""
    command = [sys.executable, "-m", "grounded_diffusion.export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    return said, usage.ru_maxrss * 1024


@pytest.fixture(scope="module")
def bundle(sd15, tmp_path_factory):
    """The bundle in FP16, with fused graphs too."""
    out = tmp_path_factory.mktemp("sd15") / "bundle"
    export(*sd15, "--out", str(out), "--precision", "fp16", "--fused", "--no-verify")
    opened = open_bundle(out)
    assert opened.manifest.image_size == (512, 512)
    return opened


@pytest.mark.slow
def test_24_gb_hold_a_batch_of_16(bundle):
    """By counted bytes, of ONNX Runtime's graphs; those without fused attention store its scores, and take more."""
    need = lambda prefix: counted_memory(bundle, prefix, sizes_of(bundle, 16, OBJECTS, (512, 512)))
    assert need(CUDA) == pytest.approx(11.5e9, rel=0.05)
    assert need(GPU) == pytest.approx(54.3e9, rel=0.05)


@pytest.mark.slow
def test_stable_diffusion_sizes_build_within_16_gb(bundle):
    peaks = {}
    for graph in GPU_GRAPHS:
        command = ("--bundle", str(bundle.path), "--engine", "tensorrt-rtx", "--sm", "89", "--guided-only")
        said, peaks[graph] = export(*command, "--graph", graph)
        print(said.splitlines()[-1], f"with {peaks[graph] / 1e9:.1f} GB for", graph)
    assert max(peaks.values()) < LIMIT, peaks
    specs = {graph: engine_spec(bundle, graph, "tensorrt_rtx", 89, Bucket(1)) for graph in GPU_GRAPHS}
    plan = load_plan(bundle.path, specs[UNET])
    assert fused_attentions(plan) == ATTENTIONS
    memory = {graph: read_sidecar(spec.directory(bundle.path)).memory for graph, spec in specs.items()}
    assert memory[UNET].weights == pytest.approx(UNET_WEIGHTS, rel=0.02)
    _, counted = bundle.manifest.memory[f"{CUDA}{UNET}"]
    assert memory[UNET].activations == pytest.approx(counted, rel=0.05), "of the graph with fused attention, as theirs"
