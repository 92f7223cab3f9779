"""`pip install '.[cuda]'` in an environment of its own ends with ONNX Runtime's CUDA provider, and keeps it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROVIDERS = "import onnxruntime; print(*onnxruntime.get_available_providers())"


def run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_cuda_installs_its_provider_and_keeps_it(wheel, tmp_path):
    """NVIDIA's own libraries, gigabytes of them, are resolved and not fetched: the provider is listed without them."""
    python, report = tmp_path / "env/bin/python", tmp_path / "report.json"
    run(sys.executable, "-m", "venv", tmp_path / "env")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--dry-run", "--report", report, f"{wheel}[cuda]")
    found = {
        item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
    }
    assert "onnxruntime-gpu" in found
    assert "onnxruntime" not in found
    assert {"nvidia-cuda-nvrtc", "cuda-core", "cuda-bindings"} <= found.keys()
    assert any(name.startswith("nvidia-cudnn") for name in found)
    fetched = [f"{name}=={version}" for name, version in found.items() if not name.startswith(("nvidia-", "grounded"))]
    run(*pip, "--no-deps", wheel, *fetched)
    assert "CUDAExecutionProvider" in run(python, "-c", PROVIDERS).split()
    for again in (f"{wheel}", f"{wheel}[completion]"):
        run(*pip, "--upgrade", again)
        assert "CUDAExecutionProvider" in run(python, "-c", PROVIDERS).split(), again
    assert "onnxruntime " not in run(python, "-m", "pip", "list", "--format", "columns")
    said = run(python, "-c", "from grounded_diffusion.engine.backends.open import BACKENDS; print(*BACKENDS)")
    assert "cuda" in said.split()
