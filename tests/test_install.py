"""What pip installed is whole: commands, data files, a light import, and no surprise in a source checkout."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

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
    assert {"gd-infer", "gd-export", "gd-train", "gd-eval", "gd-prompts", "gd-dataset", "gd-bench"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command, tmp_path):
    result = run(str(Path(sys.executable).with_name(command)), "--help", cwd=tmp_path)
    assert result.returncode == 0 and f"usage: {command}" in result.stdout


@pytest.mark.parametrize(
    "file",
    [
        "models/things-64/model_index.json",
        "models/things-64.toml",
        "engine/dataset/preview.html",
        "training/things/bank/index.json",
        "training/things/meanings.npz",
    ],
)
def test_data_files_are_installed(file):
    engine = importlib.import_module("grounded_diffusion.engine")
    assert (Path(engine.__file__).parents[1] / file).is_file()


@pytest.mark.parametrize("folder", ["elsewhere", "checkout"])
def test_the_engine_imports_light_and_fast(folder, tmp_path):
    """Also where a checkout's own folders come first on the path."""
    code = (
        "import sys, time; start = time.perf_counter(); from grounded_diffusion.engine import GroundedPipeline; "
        "print(time.perf_counter() - start, *({'torch', 'diffusers', 'transformers', 'onnxruntime'} & {*sys.modules}))"
    )
    result = run(sys.executable, "-c", code, cwd=ROOT if folder == "checkout" else tmp_path)
    assert result.returncode == 0, result.stderr
    seconds, *heavy = result.stdout.split()
    assert float(seconds) < 1 and not heavy


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of the checkout, a wheel made of the sdist and one made of the checkout itself."""
    out = tmp_path_factory.mktemp("built")
    build = lambda *arguments: subprocess.run([sys.executable, "-m", "build", *arguments], check=True, text=True)
    build("--outdir", str(out), str(ROOT))  # the sdist, and from it the wheel
    build("--wheel", "--outdir", str(out / "direct"), str(ROOT))
    (sdist,), (wheel,), (direct,) = out.glob("*.tar.gz"), out.glob("*.whl"), (out / "direct").glob("*.whl")
    return sdist, wheel, direct


def files_of(archive: Path) -> list[str]:
    """Names of the files in an sdist, below its folder, or in a wheel, without its metadata."""
    if archive.suffix == ".whl":
        return sorted(name for name in zipfile.ZipFile(archive).namelist() if ".dist-info/" not in name)
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert all(member.isfile() for member in members), "no links: not every system can unpack them"
    return sorted(member.name.partition("/")[2] for member in members)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows the files of a checkout")
def test_sdist_and_wheels_hold_every_file_once(built):
    sdist, wheel, direct = map(files_of, built)
    folders = ("grounded_diffusion", "engine", "kernels", "export", "training", "bench", "models")
    tracked = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    wanted = sorted(name if name.startswith("grounded_diffusion/") else f"grounded_diffusion/{name}" for name in ours)
    assert [name for name in sdist if name.split("/")[0] in folders] == wanted
    assert wheel == direct
    compiled = [name for name in wheel if name.startswith("grounded_diffusion/_kernels.") and name[-1] != "i"]
    assert len(compiled) == 1
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    left_out = lambda name: any(fnmatch(name, pattern) for pattern in settings["wheel"]["exclude"])
    assert sorted({*wheel} - {*compiled}) == [name for name in wanted if not left_out(name)]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_works(built, tmp_path):
    _, wheel, _ = built
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import numpy as np, grounded_diffusion
from grounded_diffusion.engine import Options
from grounded_diffusion.kernels import image_epilogue
from grounded_diffusion.kernels.cuda.nvrtc import STEMS, source
assert all(source(stem) for stem in STEMS)
assert image_epilogue(np.ones((1, 3, 2, 2), np.float32)).min() == 255
print(grounded_diffusion.__file__)
"""
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(np.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without site no editable installation comes first
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.slow
def test_a_wheel_runs_where_there_is_no_compiler(built, tiny_bundle, tmp_path):
    """gd-infer from the wheel, in an environment of its own, with nothing on the path but Python."""
    _, wheel, _ = built
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))  # after the wheel's own folder
    empty = tmp_path / "path"
    empty.mkdir()
    code = """
import shutil, sys
assert not [name for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "cmake", "ninja") if shutil.which(name)]
import grounded_diffusion._kernels as compiled
assert compiled.__file__.startswith(sys.prefix), compiled.__file__
from grounded_diffusion.engine.cli.infer import main
sys.exit(main(sys.argv[1:]))
"""
    options = ["--model", tiny_bundle, "--prompt", "a [dog]", "--steps", "1", "--out", tmp_path / "out"]
    result = subprocess.run(
        [tmp_path / "env/bin/python", "-c", code, *options],
        cwd=tmp_path, env={"PATH": str(empty), "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "summary.json").is_file()


def test_wheels_are_built_for_every_python_that_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    built = re.findall(r"cp3(\d+)-", project["tool"]["cibuildwheel"]["build"])
    (oldest,) = re.findall(r"^>=3\.(\d+)$", project["project"]["requires-python"])
    assert [int(minor) for minor in built] == list(range(int(oldest), int(oldest) + len(built)))
    named = {f"Programming Language :: Python :: 3.{minor}" for minor in built}
    assert named <= set(project["project"]["classifiers"])


@pytest.mark.parametrize(
    ("extra", "runtimes"),
    [
        ("", set()),
        ("cpu", {"onnxruntime"}),
        ("cuda", {"onnxruntime-gpu"}),
        ("tensorrt", set()),
        ("rtx", set()),
        ("export", set()),
        ("test", set()),
        ("dev", {"onnxruntime"}),
    ],
)
def test_an_extra_brings_at_most_one_onnx_runtime(extra, runtimes):
    """onnxruntime and onnxruntime-gpu write to the same folder: two of them are one that is broken."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, waiting = set(project["dependencies"]), [extra] if extra else []
    while waiting:
        for requirement in map(Requirement, project["optional-dependencies"][waiting.pop()]):
            waiting += requirement.extras if requirement.name == "grounded-diffusion" else []
            found.add(requirement.name)
    assert {Requirement(name).name for name in found if name.startswith("onnxruntime")} == runtimes
