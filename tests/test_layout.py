"""Import arrows: every folder imports only what the design allows it, and the runtime never imports torch."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CONTRACT = "contract"
ALLOWED = {
    CONTRACT: {CONTRACT},
    "kernels": {CONTRACT, "kernels"},
    "engine": {CONTRACT, "kernels", "engine"},
    "training": {CONTRACT, "kernels", "engine", "training"},
    "export": {CONTRACT, "kernels", "engine", "training", "export"},
    "bench": {CONTRACT, "kernels", "engine", "training", "export", "bench"},
}
TORCH = {"torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnx_ir", "accelerate"}
TORCHLESS = (CONTRACT, "kernels", "engine")
STANDARD = {*sys.stdlib_module_names, "numpy", "grounded_diffusion"}
PACKAGE = Path(find_spec("grounded_diffusion").origin).parent


def folder_of(parts: tuple[str, ...]) -> str:
    """The folder that a module below grounded_diffusion belongs to: ("engine", "denoise") -> engine."""
    return parts[0] if parts and parts[0] in ALLOWED else CONTRACT


def imported(tree: ast.AST, package: tuple[str, ...]):
    """Absolute dotted names of all imports, at any depth of the file, with their line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    """What a module at `parts` (below grounded_diffusion) imports against the design."""
    folder, found = folder_of(parts), []
    package = ("grounded_diffusion", *parts[:-1])
    for name, line in imported(ast.parse(source), package):
        head, *rest = name.split(".")
        if head == "grounded_diffusion" and folder_of(tuple(rest)) not in ALLOWED[folder]:
            found.append(f"line {line}: {folder} imports {name}")
        elif head in ALLOWED and find_spec(f"grounded_diffusion.{head}"):
            found.append(f"line {line}: bare import of {name}; write grounded_diffusion.{name}")
        elif folder in TORCHLESS and head in TORCH:
            found.append(f"line {line}: {folder} imports {name}")
        elif folder == CONTRACT and head not in STANDARD:
            found.append(f"line {line}: {folder} imports {name}, not of the standard library")
    return found


def modules() -> list[tuple[str, ...]]:
    """Every module of the package, as its parts below grounded_diffusion."""
    found = [(path.stem,) for path in PACKAGE.glob("*.py")]
    for folder in ALLOWED.keys() - {CONTRACT}:
        spec = find_spec(f"grounded_diffusion.{folder}")
        assert spec, f"grounded_diffusion.{folder} is not installed"
        root = Path(spec.origin).parent
        found += [(folder, *path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")]
    return found


def source_of(parts: tuple[str, ...]) -> Path:
    if len(parts) == 1:
        return PACKAGE / f"{parts[0]}.py"
    return Path(find_spec(f"grounded_diffusion.{parts[0]}").origin).parent.joinpath(*parts[1:]).with_suffix(".py")


def test_every_import_goes_the_allowed_way():
    found = modules()
    assert {folder_of(parts) for parts in found} == set(ALLOWED)
    wrong = {}
    for parts in found:
        if bad := violations(source_of(parts).read_text(encoding="utf-8"), parts):
            wrong["/".join(parts)] = bad
    assert not wrong


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (("engine", "denoise"), "import torch"),
        (("engine", "denoise"), "def f():\n    from torch import nn"),
        (("engine", "denoise"), "from grounded_diffusion.export import bundle"),
        (("engine", "denoise"), "from ..training import head"),
        (("training", "head"), "from grounded_diffusion import export"),
        (("training", "head"), "import engine"),
        (("engine", "denoise"), "from grounded_diffusion import training"),
        (("kernels", "cfg_step"), "import grounded_diffusion.engine.sampling.denoise"),
        (("export", "cli"), "from grounded_diffusion.bench import run"),
        (("bundle",), "import PIL"),
        (("bundle",), "from grounded_diffusion.kernels import cfg_step"),
    ],
)
def test_the_check_sees_a_wrong_arrow(parts, line):
    assert violations(line, parts)


def test_the_check_lets_right_arrows_pass():
    assert not violations("from grounded_diffusion.errors import UsageError\nimport numpy", ("engine", "denoise"))
    assert not violations("from . import bundle\nfrom ..engine import denoise\nimport torch", ("export", "cli"))


def test_importing_the_engine_leaves_torch_out():
    code = f"import sys, grounded_diffusion.engine; print(sorted({TORCH!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
