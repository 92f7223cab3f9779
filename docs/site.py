"""What of the documentation's site is made and not written: its first page from README.md, the options of the commands
from their parsers, the Python API from its docstrings; and where links lead that leave docs/.

A hook of mkdocs, see mkdocs.yml; `make docs` builds the site, and fails at a link that leads nowhere.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import grounded_diffusion.engine as engine

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)#\s]+)(#[^)]*)?\)")
OTHERS = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
COMMANDS = {  # command -> its module, its own commands
    "gd-infer": ("engine.cli.infer", ()),
    "gd-prompts": ("engine.cli.prompts", ()),
    "gd-dataset": (
        "engine.cli.dataset", ("convert", "verify", "stats", "status", "preview", "card", "split", "merge"),
    ),
    "gd-export": ("export.cli", ()),
    "gd-train": ("training.cli", ("examples", "real", "head", "distill")),
    "gd-eval": ("training.evaluation.cli", ("protocol1", "protocol2", "ablation", "report")),
    "gd-bench": ("bench.cli", ("speed", "quality", "grounding", "gpu-model")),
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and the pictures that pages show from other folders."""
    for source, page in OTHERS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
        for picture, _, target, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            if picture and not target.startswith("docs/"):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    files.append(File.generated(config, "options.md", content=options_page()))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to where the site has their targets. What it has not, such as code, keeps its name alone."""
    folder = ROOT if page.file.src_uri in OTHERS.values() else ROOT / "docs"

    def led(match: re.Match[str]) -> str:
        picture, text, target, place = match[1], match[2], match[3], match[4] or ""
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: {target} is not there")
        inside = path.relative_to(ROOT).as_posix()
        inside = OTHERS.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(inside):
            return f"{picture}[{text}]({PurePosixPath(inside)}{place})"
        return text if "`" in text or not path.suffix else f"`{path.relative_to(ROOT).as_posix()}`"

    return LINK.sub(led, markdown)


def options_page() -> str:
    """Every command's options, as it tells them itself."""
    lines = ["# Options of the commands", ""]
    for command, (module, own) in COMMANDS.items():
        main = importlib.import_module(f"grounded_diffusion.{module}").main
        for words in ([], *([word] for word in own)):
            title = " ".join([command, *words])
            lines += [f"{'###' if words else '##'} {title}", "", "```text", help_of(main, words).rstrip(), "```", ""]
    return "\n".join(lines)


def help_of(main: Any, words: list[str]) -> str:
    """What a command says to --help."""
    said, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    if "usage:" not in said.getvalue():
        raise PluginError(f"{main.__module__} {' '.join(words)} --help says no usage")
    return said.getvalue()


def api_page() -> str:
    """The public names, for mkdocstrings."""
    lines = [
        "# Python API",
        "",
        "`from grounded_diffusion.engine import ...`; [From Python](python.md) shows them at work.",
        "",
    ]
    for name in engine.__all__:
        value = getattr(engine, name)
        lines += [f"## {name}", "", f"::: {value.__module__}.{value.__qualname__}", ""]
    lines += ["## Errors", "", "::: grounded_diffusion.errors", ""]
    return "\n".join(lines)
