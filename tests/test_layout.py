"""The arrows: every folder, and every room of the engine, imports only what lies below it; the runtime never torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.imports import circles, inside_functions, module_imports, references

CONTRACT = "contract"
ALLOWED = {
    CONTRACT: {CONTRACT},
    "kernels": {CONTRACT, "kernels"},
    "engine": {CONTRACT, "kernels", "engine"},
    "training": {CONTRACT, "kernels", "engine", "training"},
    "export": {CONTRACT, "kernels", "engine", "training", "export"},
    "bench": {CONTRACT, "kernels", "engine", "training", "export", "bench"},
}
# The rooms of the engine, the lowest first; those of one line do not know of each other.
ROOMS = [("checks",), ("sampling",), ("prompts", "backends"), ("pipeline", "dataset"), ("runs",), ("cli",)]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
TORCH = {"torch", "diffusers", "transformers", "safetensors", "onnx", "onnxscript", "onnx_ir", "accelerate"}
TORCHLESS = (CONTRACT, "kernels", "engine")
STANDARD = {*sys.stdlib_module_names, "numpy", "msgspec", "grounded_diffusion"}
PACKAGE = Path(find_spec("grounded_diffusion").origin).parent
MOST_FILES = 16  # of code in a folder
CODE = {".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".html"}


def folder_of(parts: tuple[str, ...]) -> str:
    """The folder that a module below grounded_diffusion belongs to: ("engine", "denoise") -> engine."""
    return parts[0] if parts and parts[0] in ALLOWED else CONTRACT


def room_of(parts: tuple[str, ...]) -> str | None:
    """The room of the engine that a module lies in; "" is its front door, None elsewhere."""
    if folder_of(parts) != "engine":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in RANK else ""


def against_the_rooms(parts: tuple[str, ...], imported: tuple[str, ...]) -> bool:
    """Whether a module of the engine may not import another one. The front door knows all rooms, and no room it."""
    room, other = room_of(parts), room_of(imported)
    if not room or other is None or room == other:
        return False
    return other == "" or RANK[other] >= RANK[room]


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    """What a module at `parts` (below grounded_diffusion) imports against the design."""
    folder, found = folder_of(parts), []
    for name, line in module_imports(ast.parse(source), ("grounded_diffusion", *parts[:-1])):
        head, *rest = name.split(".")
        ours = head == "grounded_diffusion"
        if ours and folder_of(tuple(rest)) not in ALLOWED[folder]:
            found.append(f"line {line}: {folder} imports {name}")
        elif ours and against_the_rooms(parts, tuple(rest)):
            found.append(f"line {line}: {'.'.join(parts)} imports {name}, which is not below it")
        elif head in ALLOWED and find_spec(f"grounded_diffusion.{head}"):
            found.append(f"line {line}: bare import of {name}; write grounded_diffusion.{name}")
        elif folder in TORCHLESS and head in TORCH:
            found.append(f"line {line}: {folder} imports {name}")
        elif folder == CONTRACT and head not in STANDARD:
            found.append(f"line {line}: {folder} imports {name}, not of the standard library")
        elif head == "argparse" and room_of(parts) not in (None, "cli"):
            found.append(f"line {line}: {'.'.join(parts)} parses a command line; only engine/cli does")
    return found


def modules() -> Iterator[tuple[tuple[str, ...], Path]]:
    """Every module of the package: its parts below grounded_diffusion, and its file."""
    for path in PACKAGE.glob("*.py"):
        yield (path.stem,), path
    for folder in sorted(ALLOWED.keys() - {CONTRACT}):
        spec = find_spec(f"grounded_diffusion.{folder}")
        assert spec, f"grounded_diffusion.{folder} is not installed"
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            yield (folder, *path.relative_to(root).with_suffix("").parts), path


def test_every_import_goes_the_allowed_way():
    found = dict(modules())
    assert {folder_of(parts) for parts in found} == set(ALLOWED)
    assert {room_of(parts) for parts in found} == {*RANK, "", None}
    wrong = {}
    for parts, path in found.items():
        if bad := violations(path.read_text(encoding="utf-8"), parts):
            wrong["/".join(parts)] = bad
    assert not wrong


def test_no_circle():
    """Counting imports inside functions, and those for type checkers alone."""
    assert not circles(references(modules(), "grounded_diffusion"))


def test_imports_inside_functions_are_of_other_packages():
    """In what the runtime is made of: one of our own inside a function would hide an arrow."""
    ours = {}
    for parts, path in modules():
        if folder_of(parts) in TORCHLESS:
            names = inside_functions(ast.parse(path.read_text(encoding="utf-8")))
            if bad := [name for name in names if name.split(".")[0] == "grounded_diffusion"]:
                ours["/".join(parts)] = bad
    assert not ours


def test_no_folder_is_crowded():
    folders = {path.parent for _, path in modules()}
    counts = {folder: sum(path.suffix in CODE for path in folder.iterdir()) for folder in folders}
    assert len(counts) > 10
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (("engine", "sampling", "denoise"), "import torch"),
        (("engine", "sampling", "denoise"), "def f():\n    from torch import nn"),
        (("engine", "sampling", "denoise"), "from grounded_diffusion.export import bundle"),
        (("engine", "sampling", "denoise"), "from ...training import head"),
        (("engine", "sampling", "denoise"), "from grounded_diffusion.engine.backends.host import HostBackend"),
        (("engine", "sampling", "denoise"), "from grounded_diffusion.engine import Sample"),
        (("engine", "prompts", "file"), "from grounded_diffusion.engine.backends import open"),
        (("engine", "checks"), "from grounded_diffusion.engine.sampling import noise"),
        (("engine", "dataset", "record"), "if TYPE_CHECKING:\n    import grounded_diffusion.engine.pipeline.job"),
        (("engine", "dataset", "storage", "base"), "def f():\n    from ...runs import worker"),
        (("engine", "runs", "worker"), "from ..cli import infer"),
        (("engine", "runs", "worker"), "import argparse"),
        (("training", "head"), "from grounded_diffusion import export"),
        (("training", "head"), "import engine"),
        (("kernels", "cfg_step"), "import grounded_diffusion.engine.sampling.denoise"),
        (("export", "cli"), "from grounded_diffusion.bench import run"),
        (("bundle",), "import PIL"),
        (("bundle",), "from grounded_diffusion.kernels import cfg_step"),
    ],
)
def test_the_check_sees_a_wrong_arrow(parts, line):
    assert violations(line, parts)


def test_the_check_lets_right_arrows_pass():
    given = "from grounded_diffusion.errors import UsageError\nimport numpy\nfrom ..sampling import noise"
    assert not violations(given, ("engine", "backends", "host"))
    assert not violations("from . import bundle\nfrom ..engine import denoise\nimport torch", ("export", "cli"))
    assert not violations("from ..runs import worker\nimport argparse", ("engine", "cli", "infer"))
    assert not violations("from grounded_diffusion.engine.runs import worker", ("engine", "__init__"))


def test_the_check_sees_a_circle_inside_a_function(tmp_path):
    inner = "def f():\n    from ours import c"
    texts = {"a": "import ours.b", "b": inner, "c": "from ours.a import x", "d": "import ours.a"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = [((name,), tmp_path / name) for name in texts]
    assert circles(references(found, "ours")) == [["ours.a", "ours.b", "ours.c"]]
    assert inside_functions(ast.parse(inner)) == ["ours.c"]


def test_no_folder_passes_for_another_package():
    """`kernels` is one that transformers looks for."""
    for folder in ALLOWED.keys() - {CONTRACT}:
        spec = find_spec(folder)
        assert spec is None or Path(__file__).parents[1] not in Path(spec.origin or "/").parents, f"{folder} is ours"


def loaded_by(code: str) -> set[str]:
    """Names of the modules that are loaded once some code has run in a fresh process."""
    code = f"{code}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_engine_leaves_torch_out():
    assert not TORCH & loaded_by("from grounded_diffusion.engine import GroundedPipeline")


def test_commands_without_images_load_no_runtime():
    loaded = loaded_by("import grounded_diffusion.engine.cli.prompts, grounded_diffusion.engine.cli.dataset")
    assert not loaded & {"onnxruntime", "tokenizers", "ray", "grounded_diffusion.engine.pipeline.pipeline"}
