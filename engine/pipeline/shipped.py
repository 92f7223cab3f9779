"""The model that ships with the package: exported once into the user's cache.

Exporting needs torch, the engine must not have it, so it happens in a process of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import grounded_diffusion
from grounded_diffusion import __version__
from grounded_diffusion.bundle import EXPORTER, SHIPPED, open_bundle, sha256
from grounded_diffusion.cache import cache_folder
from grounded_diffusion.errors import BundleError, UsageError

PACKAGE = Path(grounded_diffusion.__file__).parent
NEEDED = ("torch", "diffusers", "transformers", "onnxscript")
STUDENT = "student.safetensors"  # beside the shipped model: the LoRA that makes few steps of it


def shipped_checkpoint() -> Path:
    """Directory of the shipped checkpoint, in the wheel as in the source tree."""
    path = PACKAGE / "models" / SHIPPED
    if not (path / "model_index.json").is_file():
        line = f"this installation has no shipped model in {path}; give `model` a bundle made by gd-export"
        raise UsageError(line, "model")
    return path


def checkpoint_key(checkpoint: Path) -> str:
    """SHA-256 over what an export of a checkpoint depends on: its files, the exporter's, this package's version."""
    digest = hashlib.sha256(__version__.encode())
    for folder, pattern in ((checkpoint, "*"), (PACKAGE / EXPORTER.rpartition(".")[2], "*.py")):
        for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
            digest.update(f"\0{file.relative_to(folder).as_posix()}\0{sha256(file)}".encode())
    return digest.hexdigest()


def shipped_bundle(
    report: Callable[[str], None] = lambda line: None, student: bool = False, int8: bool = False
) -> Path:
    """The shipped model's bundle, exported now if the cache does not have it.

    Args:
        report: told, line by line, that an export starts and how it goes.
        student: the model of four unguided steps that was distilled from it.
        int8: with UNets in 8 bits beside the others.

    Raises:
        UsageError: no shipped model, the export extra is not installed, or the cache cannot be written.
        BundleError: the export failed.
    """
    return cached_export(shipped_checkpoint(), cache_folder(), report, STUDENT if student else None, int8)


def cached_export(
    checkpoint: Path, cache: Path, report: Callable[[str], None], lora: str | None = None, int8: bool = False
) -> Path:
    """The bundle of a checkpoint in a cache folder; a damaged one is made again. Raises as shipped_bundle does.

    Args:
        lora: a file of the checkpoint's that is fused into it.
        int8: add UNets in 8 bits.
    """
    name, given = checkpoint.name, ["--ckpt", str(checkpoint)]
    if lora:
        name, given = f"{name}-{Path(lora).stem}", [*given, "--lora", str(checkpoint / lora)]
    if int8:
        name, given = f"{name}-int8", [*given, "--int8"]
    bundle = cache / f"{name}-{checkpoint_key(checkpoint)[:16]}"
    if bundle.is_dir():
        try:
            open_bundle(bundle)
            return bundle
        except BundleError:
            shutil.rmtree(bundle)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"exporting the shipped model needs {', '.join(missing)}: pip install 'grounded-diffusion[export]', "
            "or give `model` a bundle exported elsewhere",
            "model",
        )
    report(f"exporting the shipped model {name}, once, to {bundle} (a minute or two)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".export-", dir=cache))
    except OSError as error:
        raise UsageError(f"cannot write to the cache {cache}: {error.strerror}; set XDG_CACHE_HOME") from None
    try:
        export(given, work / "bundle", report)
        open_bundle(work / "bundle")
        if not bundle.exists():  # another process may have been faster
            (work / "bundle").rename(bundle)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return bundle


def export(options: Sequence[str], bundle: Path, report: Callable[[str], None]) -> None:
    """Run gd-export in a process of its own and pass on what it says. Raises BundleError with its last line.

    Args:
        options: of gd-export, without --out.
    """
    module = ["-P", "-m", EXPORTER]  # -P: never modules that happen to lie in the current folder
    command = [sys.executable, *module, *options, "--out", str(bundle)]
    said = "it said nothing"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                if line.strip():
                    said = line.rstrip()
                    report(said)
        except BaseException:  # an interrupted export must not go on by itself
            process.kill()
            raise
    if process.returncode:
        raise BundleError(f"exporting {options[1]} failed: {said}")
