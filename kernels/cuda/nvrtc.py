"""Cubins of the CUDA kernels: built ahead of time by CMake, taken from a cache, or compiled by NVRTC.

Compiling needs no GPU, so that a machine without one can check every architecture.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from grounded_diffusion.cache import cache_folder, write_cached
from grounded_diffusion.errors import BackendError

STEMS = ("cfg_step", "image_epilogue", "mask_epilogue")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
STANDARD = "c++17"
FOLDER = Path(__file__).resolve().parent  # of the .cu files; their headers lie in core/ beside it
_DIGEST_BYTES = hashlib.sha256().digest_size


def source(stem: str) -> str:
    """The CUDA source of one operation with its headers put in place: NVRTC then needs no include path."""
    seen: set[str] = set()

    def expand(file: Path) -> str:
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith('#include "'):
                header = line.split('"')[1]
                if header not in seen:
                    seen.add(header)
                    lines.append(expand(FOLDER.parent / "core" / header))
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return expand(FOLDER / f"{stem}.cu")


def compile_cubin(stem: str, arch: str) -> bytes:
    """Compile one operation for one architecture, such as "sm_90".

    Raises:
        BackendError: cuda-core or NVRTC is not installed, or the compiler refused (its log is in the message).
    """
    try:
        from cuda.core import Program, ProgramOptions

        program = Program(source(stem), "c++", options=ProgramOptions(arch=arch, std=STANDARD, name=f"{stem}.cu"))
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"cannot compile {stem} for {arch}: {error}; pip install 'grounded-diffusion[gpu]'"
        ) from error
    try:
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda-core raises its own NVRTC error classes, which differ between versions
        raise BackendError(f"NVRTC refused kernels/cuda/{stem}.cu for {arch}: {error}") from error


def cache_key(stem: str, arch: str) -> str:
    """Hash of all that decides the cubin's bytes: source with headers, architecture, options, compiler version."""
    from cuda.bindings import nvrtc

    _, *version = nvrtc.nvrtcVersion()
    parts = (source(stem), arch, STANDARD, ".".join(map(str, version)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cubin(stem: str, arch: str, cache: Path | None = None) -> bytes:
    """The cubin of one operation: the one built with the wheel, else the cached one, else compiled and cached.

    A cached file begins with the SHA-256 of the rest; one that does not match is compiled again.
    """
    built = FOLDER / "cubin" / f"{stem}.{arch}.cubin"
    if built.is_file():
        return built.read_bytes()
    try:
        file = (cache or cache_folder() / "cubin") / f"{stem}.{arch}.{cache_key(stem, arch)}.cubin"
    except ImportError as error:
        raise BackendError(f"CUDA kernels need NVRTC ({error}); pip install 'grounded-diffusion[gpu]'") from error
    if file.is_file():
        raw = file.read_bytes()
        if hashlib.sha256(raw[_DIGEST_BYTES:]).digest() == raw[:_DIGEST_BYTES]:
            return raw[_DIGEST_BYTES:]
    code = compile_cubin(stem, arch)
    write_cached(file, hashlib.sha256(code).digest() + code)
    return code
