"""What pip installed is whole: commands, data files, a light import, and no surprise in a source checkout."""

import importlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import grounded_diffusion

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(e.name for e in metadata.distribution("grounded-diffusion").entry_points)


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_package_under_test_is_the_installed_one():
    engine = importlib.import_module("grounded_diffusion.engine")
    installed_from = json.loads(metadata.distribution("grounded-diffusion").read_text("direct_url.json") or "{}")
    editable = installed_from.get("dir_info", {}).get("editable", False)
    assert Path(engine.__file__).resolve().is_relative_to(ROOT / "engine") == editable, "see CONTRIBUTING.md"
    assert metadata.version("grounded-diffusion") == grounded_diffusion.__version__


def test_all_commands_are_there():
    assert {"gd-infer", "gd-export", "gd-train", "gd-prompts", "gd-dataset", "gd-bench"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command, tmp_path):
    result = run(str(Path(sys.executable).with_name(command)), "--help", cwd=tmp_path)
    assert result.returncode == 0 and f"usage: {command}" in result.stdout


@pytest.mark.parametrize(
    "file",
    [
        "models/emoji-64/model_index.json",
        "models/emoji-64.toml",
        "engine/dataset/preview.html",
        "training/emoji/glyphs.png",
        "training/things/bank/index.json",
        "training/things/meanings.npz",
    ],
)
def test_data_files_are_installed(file):
    engine = importlib.import_module("grounded_diffusion.engine")
    assert (Path(engine.__file__).parents[1] / file).is_file()


def test_a_model_whose_training_goes_on_is_not_installed():
    assert not [file for file in metadata.files("grounded-diffusion") if "things-64" in str(file)]


@pytest.mark.parametrize("folder", ["elsewhere", "checkout"])
def test_the_engine_imports_light_and_fast(folder, tmp_path):
    """Also where a checkout's own folders come first on the path."""
    code = (
        "import time; start = time.perf_counter(); import grounded_diffusion.engine, sys; "
        "print(time.perf_counter() - start, *({'torch', 'diffusers', 'transformers', 'onnxruntime'} & {*sys.modules}))"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT if folder == "checkout" else tmp_path)
    assert result.returncode == 0, result.stderr
    seconds, *heavy = result.stdout.split()
    assert float(seconds) < 1 and not heavy
