"""The real ONNX Runtime CUDA provider runs a bundle on libraries that compute nothing: no GPU is needed.

It partitions the graphs, checks its own operators, plans memory and captures CUDA graphs as it does on a GPU, from the
whole `--backend cuda`, over a driver of host memory. It is found where onnxruntime-gpu is installed or, since that and
onnxruntime exclude each other, unpacked in the folder that GD_ORT_GPU names: `pip install --no-deps --target FOLDER
onnxruntime-gpu`. CUDA's headers come from a toolkit or from pip's nvidia-cuda-runtime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cuda.compile import build, sources
from helpers.stub_cuda.build import PROVIDER, SITE, build_stubs, cuda_headers, onnxruntime_gpu
from helpers.stub_cuda.run import BATCH, STEPS

from grounded_diffusion.bundle import CUDA, UNET, open_bundle
from grounded_diffusion.kernels.cuda import nvrtc

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[2]
PUNISHED = ("launch on the default stream", "copy on the default stream", "launch of a size that fails")
GRAPHS = 5  # of a guided run: context, the UNet with and without guidance, the grounded one, decoder


@pytest.fixture(scope="module")
def fused_bundle(tiny_checkpoint, tmp_path_factory):
    from grounded_diffusion.export.bundle import export_bundle
    from grounded_diffusion.training.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("fused") / "bundle"
    export_bundle(load_checkpoint(tiny_checkpoint), path, precision="fp16", fused=True)
    assert f"{CUDA}{UNET}" in open_bundle(path).manifest.files
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a process needs to find the provider, the stubs and the driver before any others."""
    site, headers = onnxruntime_gpu(), cuda_headers()
    if site is None:
        pytest.skip(f"no onnxruntime with a CUDA provider, installed or in the folder that {SITE} names")
    if headers is None:
        pytest.skip("no headers of CUDA: set CUDA_HOME, or pip install nvidia-cuda-runtime")
    folder = tmp_path_factory.mktemp("stubs")
    build_stubs(site / PROVIDER, headers, folder)
    for stem in nvrtc.STEMS:
        nvrtc.cubin(stem, "sm_90")  # NVRTC does not run beside that driver
    (folder / "libcuda.so.1").symlink_to(build(folder, sources(), entry="driver.cpp"))
    path = os.pathsep.join([str(site), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module", params=["tiny", "half", "fused"])
def told(request, environment):
    """What the libraries were called for in two equal batches, see helpers/stub_cuda/run.py."""
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    command = [sys.executable, "-m", "helpers.stub_cuda.run", str(bundle)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_node_is_on_the_gpu(told):
    """A session with a node elsewhere cannot be captured."""
    assert len(told["sessions"]) == GRAPHS
    assert told["first"]["capture"] == GRAPHS


def test_nothing_happens_while_capturing_that_a_gpu_refuses(told):
    assert not [name for name in told["first"] if name.endswith("while capturing")]
    assert not [name for name in PUNISHED if name in told["first"]]


def test_a_replay_is_one_launch_and_nothing_else(told):
    """A step is one replay; context and decoder are one more each. Nothing is copied, allocated or waited for."""
    assert told["second"] == {"replay": STEPS + 2}


def test_nothing_is_left(told):
    assert told["left"] == 0
    assert told["shape"] == [BATCH, 64, 64, 3]
