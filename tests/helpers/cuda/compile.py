"""The CUDA kernels as C++ for this machine's processor."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from grounded_diffusion.kernels.cuda.nvrtc import STEMS, source

FOLDER = Path(__file__).parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))  # the one that the package was built with
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w")
FMA = ("-mfma", "-ffp-contract=fast")  # fused multiply-add, as nvcc and NVRTC make it
SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
PTX = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));': "x = lanes::from_half(h.bits);",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));': "h.bits = lanes::to_half(x);",
}


def sources() -> dict[str, str]:
    """The text of every operation's .cu file with its headers, by stem."""
    return {stem: source(stem) for stem in STEMS}


def as_cpp(text: str) -> str:
    """A .cu file as C++: its PTX in C++, and its kernels known by name."""
    names = re.findall(r'extern "C" __global__ void (\w+)\(', text)
    for ptx, cpp in PTX.items():
        assert text.count(ptx) == 1, f"{ptx} is not in half.cuh"
        text = text.replace(ptx, cpp)
    known = "\n".join(f'static lanes::Register register_{name}("{name}", {name});' for name in names)
    return f'#include "lanes.h"\n{text}\n{known}\n'


def build(folder: Path, texts: Mapping[str, str], flags: Sequence[str] = (), entry: str = "launch.cpp") -> Path:
    """A library of kernels, each a text of `sources`, and what launches them; not built again where `folder` has it."""
    parts = [as_cpp(text) for text in texts.values()] + [(FOLDER / entry).read_text(encoding="utf-8")]
    objects = [_object(folder, part, flags) for part in parts]
    library = folder / f"{_hash(*map(str, objects))}.so"
    if not library.exists():
        _run([*COMPILER, *flags, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), *map(str, objects), "-ldl"])
    return library


def _object(folder: Path, text: str, flags: Sequence[str]) -> Path:
    file = folder / f"{_hash(text, *flags)}.o"
    if not file.exists():
        file.with_suffix(".cpp").write_text(text, encoding="utf-8")
        _run([*COMPILER, *FLAGS, *flags, f"-I{FOLDER}", "-c", "-o", str(file), str(file.with_suffix(".cpp"))])
    return file


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compilers_library(name: str) -> str:
    """Path of one of the compiler's own libraries."""
    return _run([*COMPILER, f"-print-file-name={name}"])
