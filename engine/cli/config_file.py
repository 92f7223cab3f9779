"""--config: options from a file, a TOML file of them or the run.json of any run. The command line wins.

A file's options become words of a command line, so that they are checked exactly as those are.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.cli.common import Parser
from grounded_diffusion.engine.dataset.formats import WITHOUT_CLASSES
from grounded_diffusion.engine.dataset.runfile import RUN, RunFile
from grounded_diffusion.engine.prompts.vocabulary import COCO_IDS
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path, readable_errors
from grounded_diffusion.reading import Misfit, as_type, load_json, load_toml, read_file

# An option of the command line also takes the place of a file's that excludes it.
INSTEAD = {"prompt": "prompts", "prompts": "prompt", "backend": "precision", "precision": "backend",
           "jpeg_quality": "png", "png": "jpeg_quality"}  # fmt: skip
ALONE = ("ray",)  # options that also stand without their value, as in ray = true
# What run.json says and no option sets: contents that it knows by their SHA-256 alone, and what follows from them.
DERIVED = ("model", "prompts", "samples", "classes")


def add_config_option(group: argparse._ArgumentGroup) -> None:
    """--config."""
    group.add_argument(
        "--config", type=local_path, metavar="FILE",
        help="options from a TOML file, as in images-per-prompt = 4, or from a run.json, which has all but prompts, "
        "model and output; those given here win",
    )  # fmt: skip


def parse_with_config(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and of the file that its --config names. Raises UsageError."""
    args = parser.parse_args(argv)
    if args.config is None:
        return args
    known = vars(parser.parse_args([]))
    given = {name for word in argv if (name := word.partition("=")[0].removeprefix("--").replace("-", "_")) in known}
    given |= {INSTEAD[name] for name in given if name in INSTEAD}
    options = {name: value for name, value in read_options(args.config, known).items() if name not in given}
    names = options.pop("names") if isinstance(options.get("names"), list) else None
    words = [word for name, value in options.items() for word in as_words(args.config, name, value, known[name])]
    try:
        parser.parse_args(words)
    except UsageError as error:
        raise UsageError(f"{args.config}: {error}") from None
    args = parser.parse_args([*words, *argv])
    if names is not None:
        args.names = tuple(map(str, names))
    return args


def read_options(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names of their fields. Raises UsageError."""
    try:
        with readable_errors(path, "read"):
            content = read_file(path)
        found = load_json(content) if path.suffix == ".json" else load_toml(content)
        if path.suffix == ".json":
            as_type(found, RunFile, content)
    except Misfit as error:
        where = f", line {error.line}" if error.line else ""
        raise UsageError(f"{path} cannot be read{where}: {error}; give --config a TOML file or a {RUN}") from None
    if path.suffix == ".json":
        options = of_run(path, found)
        if unknown := sorted(options.keys() - known.keys()):
            raise UsageError(f"{path} has the setting {unknown[0]}, for which gd-infer has no option")
        return options
    options = {name.replace("-", "_"): value for name, value in found.items()}
    for name in options:
        if name not in known or name == "config":
            near = [word.replace("_", "-") for word in difflib.get_close_matches(name, known)]
            hint = f"; did you mean {near[0]}?" if near else ", see gd-infer --help"
            raise UsageError(f"{path}: there is no option {name.replace('_', '-')}{hint}")
    return options


def of_run(path: Path, content: Any) -> dict[str, Any]:
    """The options that a run.json stands for: those of the same run, but for its prompts, model and output."""
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or "steps" not in settings:
        raise UsageError(f"{path} is no {RUN} of gd-infer; give --config one, or a TOML file")
    options = {name: value for name, value in settings.items() if name not in DERIVED and value is not None}
    format, classes = settings.get("format"), settings.get("classes") or {}
    if format not in WITHOUT_CLASSES and settings.get("jpeg_quality") is None:
        options["png"] = True
    if classes:
        coco = set(classes.values()) <= set(COCO_IDS) and list(classes.values()) != list(range(1, len(classes) + 1))
        options["names"] = "coco" if coco else list(classes)
    if (least := options.pop("instances", None)) is not None:
        options |= {"instances": "components", "instance_area": least}
    if isinstance(size := settings.get("size"), list):
        options["size"] = "x".join(map(str, size))
    return options


def as_words(path: Path, name: str, value: Any, default: Any) -> list[str]:
    """An option with its value as words of a command line. Raises UsageError."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        if not isinstance(default, bool) and name not in ALONE:
            raise UsageError(f"{path}: {option[2:]} takes a value, not {str(value).lower()}")
        return [option] if value else []
    if isinstance(default, bool) or isinstance(value, dict):
        raise UsageError(f"{path}: {option[2:]} cannot be {value!r}; see gd-infer --help")
    if isinstance(value, list):
        return [f"{option}={one}" for one in value] if name == "prompt" else [option, *map(str, value)]
    return [f"{option}={value}"]
