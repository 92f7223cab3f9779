"""Every code block of the README and the docs: commands parse and, where no GPU is needed, run; Python runs."""

import ast
import contextlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from helpers import null_backend as null

from grounded_diffusion.bench import cli as bench
from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.backends.open import open_backend
from grounded_diffusion.engine.cli import dataset, infer, prompts
from grounded_diffusion.engine.dataset.status import describe_status
from grounded_diffusion.engine.prompts.file import PromptFile
from grounded_diffusion.errors import BackendError
from grounded_diffusion.export import cli as export
from grounded_diffusion.training import cli as train
from grounded_diffusion.training.evaluation import cli as evaluation

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


PARSERS = {
    "gd-infer": lambda words: infer.build_parser().parse_args(words),
    "gd-dataset": lambda words: dataset.build_parser().parse_args(words),
    "gd-prompts": lambda words: prompts.build_parser().parse_args(words),
    "gd-bench": bench.parse,
    "gd-export": export.parse,
    "gd-train": train.parse,
    "gd-eval": lambda words: evaluation.build_parser().parse_args(words),
}
# Blocks that are no commands, by their beginning: what a page shows, and not what is typed.
SHOWN = (
    "    ",
    "room      module",
    "loop stream",
    "unet.onnx: ",
    "out/: stopped",
    "a photograph of a [",
    "your model ─",
    "$ cat ",
)


def blocks(page):
    """(language, text) of the page's blocks."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def is_shown(text):
    """Whether a block is a picture, or what a command says."""
    return "─►" in text or text.startswith(SHOWN)


def commands(page):
    """The words of every command line in a page's blocks; those of a loop with its variable as it stands."""
    for language, text in blocks(page):
        if language == "sh" or (language == "" and not is_shown(text)):
            for line in re.sub(r"\\\n", " ", text).splitlines():
                for part in re.sub(r"^for .*?; do (.*); done$", r"\1", line).split(" && "):
                    if words := shlex.split(part, comments=True):
                        yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_known_kind(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))
    for language, block in blocks(page):
        assert language in ("sh", "python", ""), language
        if language == "python":
            ast.parse(block)
        elif language == "sh":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_what_the_programs_take(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(page):
        name, *rest = words
        if name == "accelerate":  # launch OPTIONS -m MODULE ARGUMENTS
            name, rest = "python", rest[rest.index("-m") :]
        if name in PARSERS:
            rest = ["base" if word == "$stage" else word for word in rest]
            with contextlib.suppress(BackendError):  # an engine of a backend that is not installed here
                PARSERS[name](rest)
        elif name == "make":
            assert set(rest) <= set(targets)
        elif name == "pip":
            assert rest[0] == "install"
            assert {extra for word in rest for extra in re.findall(r"\[(\w+)\]", word)} <= set(extras)
        elif name == "python" or words[:2] == ["accelerate", "launch"]:
            assert importlib.util.find_spec(rest[rest.index("-m") + 1])
        else:
            pytest.fail(f"{page.name}: nobody knows the command {shlex.join(words)}")


@pytest.fixture
def here(tiny_bundle, tmp_path, monkeypatch):
    """An empty folder with a short prompt file, where the shipped model is a small one."""
    from grounded_diffusion.engine.pipeline import shipped
    from grounded_diffusion.engine.runs import open as runs_open

    for module in (shipped, runs_open):
        monkeypatch.setattr(module, "shipped_bundle", lambda *_: tiny_bundle)
    monkeypatch.chdir(tmp_path)
    short(tmp_path / "prompts.jsonl")
    return tmp_path


def short(file):
    """A prompt file of 40 images with one object or two."""
    one = {"prompt": "a photograph of a dog", "objects": ["dog"], "count": 30}
    two = {"prompt": "a photograph of a dog and a cat", "objects": ["dog", "cat"], "count": 10}
    file.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")


@pytest.mark.parametrize("page", ["README.md", "docs/datasets.md", "docs/runs.md", "docs/watching.md"])
def test_commands_on_data_sets_run(here, capsys, page):
    """In their order, with a model that draws nothing. The 20,082 images of VOC are 40 once they have been counted."""
    run = {"gd-prompts": prompts.main, "gd-infer": null.main, "gd-dataset": dataset.main}
    done = []
    for name, *rest in commands(ROOT / page):
        if name not in run or "bundle" in rest:  # bundles are made by gd-export, which has tests of its own
            continue
        rest = ["gd.prom" if word.startswith("/var/") else word for word in rest]
        if name == "gd-prompts":
            (here / "prompts.jsonl").unlink()
        assert run[name](rest) == 0, (name, rest, capsys.readouterr().err)
        if name == "gd-prompts":
            assert PromptFile(here / "prompts.jsonl", [], 1).samples == 500 * 20 + 71 * 142
            short(here / "prompts.jsonl")
        done.append(name)
    assert "gd-infer" in done
    assert "gd-dataset" in done


def test_the_data_set_from_python_is_one(here, capsys):
    """The page's own commands make out/; what its Python makes of it verifies and has a status."""
    assert null.main(["--prompts", "prompts.jsonl", "--out", "out"]) == 0
    ((_, block),) = [block for block in blocks(ROOT / "docs/datasets.md") if block[0] == "python"]
    exec(compile(block, "docs/datasets.md", "exec"), {})
    capsys.readouterr()
    assert dataset.main(["verify", "coco"]) == 0
    assert dataset.main(["status", "coco"]) == 0
    assert "40 records, no problems" in (said := capsys.readouterr().out)
    assert "coco: finished" in said
    assert dataset.main(["convert", "out", "--format", "coco", "--out", "converted"]) == 0
    tree = lambda name: {path.relative_to(name): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}
    assert tree("coco") == tree("converted")


def test_the_readmes_pipeline(here, capsys, tiny_bundle, monkeypatch):
    (block,) = [text for language, text in blocks(ROOT / "README.md") if language == "python" and ".open()" in text]
    monkeypatch.setattr("grounded_diffusion.engine.pipeline.pipeline.shipped_bundle", lambda *_: tiny_bundle)
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"\(64, 64, 3\) \d+ pixels of dog\n$", capsys.readouterr().out)


def test_the_page_on_gpus_names_what_is_there():
    """It needs a GPU to run; its imports and the arguments of its calls are those of the functions."""
    ((_, block),) = [block for block in blocks(ROOT / "docs/gpu.md") if block[0] == "python"]
    tree = ast.parse(block)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "docs/gpu.md", "exec"), {})
    functions = {"GroundedPipeline.open": GroundedPipeline.open, "open_backend": open_backend}
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in functions]
    assert len(called) == len(functions)
    for call in called:
        named = {keyword.arg: None for keyword in call.keywords}
        inspect.signature(functions[ast.unparse(call.func)]).bind(*call.args, **named)


def test_the_page_on_watching_shows_what_status_says(monkeypatch):
    ((_, block),) = [block for block in blocks(ROOT / "docs/watching.md") if block[1].startswith("out/: stopped")]
    counts = {"total": 400, "accepted": 33, "rejected": 15, "quarantined": 0, "missing": 352}
    holder = {"shard": 6, "host": "node3", "pid": 22472, "started": "2026-01-01T00:00:00+00:00", "alive": False}
    status = {
        "output": "out/", "state": "stopped", "format": "folder", "left": None, "rate": 3.312,
        "shards": {"total": 50, "finished": 6, "in_hand": 0, "missing": 44, "damaged": []},
        "samples": counts, "reasons": {"rejected": {"area": 15}, "quarantined": {}}, "holders": [holder],
        "next": "give the same gd-infer command again: it finishes what is missing",
    }  # fmt: skip
    assert describe_status(status) == block.rstrip("\n")


def test_the_readmes_prompt_file(tmp_path):
    ((_, block),) = [block for block in blocks(ROOT / "README.md") if block[1].startswith("a photograph of a [")]
    (tmp_path / "prompts.txt").write_text(block)
    assert [prompt.objects for _, prompt in PromptFile(tmp_path / "prompts.txt", [], 1)] == [
        ("giraffe",), ("whale", "shark"),
    ]  # fmt: skip
