"""Stand-ins for the CUDA libraries that ONNX Runtime's CUDA provider links: all that it asks for, few of which act."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

from helpers.cuda.compile import COMPILER

FOLDER = Path(__file__).parent
SITE = "GD_ORT_GPU"  # environment variable: a folder with an unpacked onnxruntime-gpu, where none is installed
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
CUDNN = "libcudnn.so.9"  # opened by name, not linked
HEADER = "cuda_runtime_api.h"


def onnxruntime_gpu() -> Path | None:
    """The folder that an onnxruntime with a CUDA provider is imported from: SITE's, or where one is installed."""
    installed = importlib.util.find_spec("onnxruntime")
    places = [os.environ.get(SITE), installed and installed.origin and Path(installed.origin).parents[1]]
    return next((Path(place) for place in places if place and (Path(place) / PROVIDER).is_file()), None)


def cuda_headers() -> Path | None:
    """A folder with CUDA's headers: of a toolkit, or of pip's nvidia-cuda-runtime."""
    toolkits = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *map(str, Path("/usr/local").glob("cuda-13*"))]
    found = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    places = [*(Path(toolkit) / "include" for toolkit in toolkits), *(place / "cu13/include" for place in packages)]
    return next((place for place in places if (place / HEADER).is_file()), None)


def wanted(provider: Path) -> dict[str, list[str]]:
    """The symbols that a provider asks for, by the library it asks."""
    say = lambda *command: subprocess.run([*command, provider], capture_output=True, text=True, check=True).stdout
    libraries = {name: [] for name in re.findall(r"\[(libcu\w+\.so\.\d+)\]", say("readelf", "-d")) if name != DRIVER}
    for name in (line.split()[-1] for line in say("nm", "-D", "--undefined-only").splitlines()):
        symbol, _, library = name.partition("@")
        if library.startswith("lib"):
            libraries.setdefault(library, []).append(symbol)
        elif symbol.startswith("cuTensor"):  # of the driver, which is opened by name
            libraries.setdefault(RUNTIME, []).append(symbol)
    names = re.findall(rb"\bcudnn[A-Z][A-Za-z0-9_]+\b", provider.read_bytes())
    return libraries | {CUDNN: sorted({name.decode() for name in names})}


def build_stubs(provider: Path, headers: Path, out: Path) -> None:
    """Build the libraries into a folder: CUDA's runtime first, which counts the calls of the others."""
    libraries = wanted(provider)
    for library in sorted(libraries, key=lambda name: name != RUNTIME):
        acting = FOLDER / ("runtime.cpp" if library == RUNTIME else "libraries.cpp")
        defined = set(re.findall(r"\b(\w+)[()]", acting.read_text(encoding="utf-8")))
        answers = [f'int {s}() {{ return stub_called("{s}"), 0; }}' for s in libraries[library] if s not in defined]
        file = out / f"{library}.cpp"
        file.write_text("\n".join(['extern "C" {', "void stub_called(const char*);", *answers, "}"]), encoding="utf-8")
        version = out / f"{library}.map"  # the provider asks for symbols by version, which is the library's name
        version.write_text(f"{library} {{ global: *; }};")
        sources = [file, acting, *([] if library == RUNTIME else [out / RUNTIME])]
        command = [*COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-w", f"-I{headers}", *map(str, sources)]
        subprocess.run(
            [*command, f"-Wl,-soname,{library},--version-script,{version}", "-o", str(out / library)], check=True
        )
