"""Built TensorRT engines inside a bundle: what one was made from, where it lies, and whether it may be loaded.

`engines/<backend>/<key>/` holds `engine.plan` and, written last, `engine.json`. The key is a hash of everything that
decides the plan, so a changed model, version, GPU or shape looks for another directory; the sidecar says in words
what the plan is, so that a refusal can name the difference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from msgspec import Struct

from grounded_diffusion.bundle import CONTEXT, FP8, GPU, Bundle, HasSchema, read_manifest, sha256
from grounded_diffusion.errors import BackendError
from grounded_diffusion.reading import Misfit, as_type, load_json, read_file

PACKAGES = {"tensorrt": "grounded-diffusion[tensorrt]", "tensorrt_rtx": "grounded-diffusion[rtx]"}  # what pip installs
PLAN, SIDECAR = "engine.plan", "engine.json"
SCHEMA = 1
OBJECTS = 8  # queries of an image in a static profile, unless asked otherwise
_KEY_LENGTH = 24
IN_FP8 = "fp8"  # the precision of an engine whose graph is of FP8


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything that decides an engine.

    Attributes:
        graph: name of the ONNX file it was built from.
        backend: "tensorrt" or "tensorrt_rtx".
        version: of that package.
        device: what it runs on: "sm_86" for TensorRT-RTX, GPU name and architecture for TensorRT.
        shapes: of every input, by name; the engine takes no others.
        precision: of the bundle's weights, or "fp8".
        flags: builder settings, by name.
        files: SHA-256 of the ONNX file, the one for a GPU, and of the weights it refers to, by name.
    """

    graph: str
    backend: str
    version: str
    device: str
    shapes: dict[str, list[int]]
    precision: str
    flags: dict[str, Any]
    files: dict[str, str]

    def __post_init__(self) -> None:
        if self.backend not in PACKAGES:
            raise BackendError(f"there is no backend {self.backend}; choose one of {', '.join(PACKAGES)}")

    @property
    def variant(self) -> str:
        """Which of the bundle's graphs it is of: FP8 or GPU."""
        return FP8 if self.precision == IN_FP8 else GPU

    @property
    def key(self) -> str:
        """Name of the engine's directory."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]

    def directory(self, bundle: Path) -> Path:
        """Where the engine lies in a bundle."""
        return bundle / "engines" / self.backend / self.key

    def __str__(self) -> str:
        return f"{self.graph} for {self.backend} {self.version} on {self.device}, {shapes_text(self.shapes)}"


class EngineMemory(Struct, frozen=True):
    """Device memory of an engine in bytes, as its builder has planned it."""

    activations: int  # while it runs; contexts that never run at once share it
    weights: int  # as long as it is loaded


class Sidecar(Struct):
    """engine.json."""

    schema: int
    spec: EngineSpec
    plan_sha256: str
    memory: EngineMemory | None = None  # None: not told by the builder


def shapes_text(shapes: dict[str, list[int]]) -> str:
    """Shapes as a person reads them: latents 2x4x8x8, timestep 2."""
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


def bundle_files(bundle: Bundle, graph: str, variant: str = GPU) -> dict[str, str]:
    """SHA-256 of a graph and of the bundle's shared weights, as its manifest has them."""
    own = bundle.variant(variant, graph).relative_to(bundle.path).as_posix()
    listed = bundle.manifest.files
    return {name: digest for name, digest in listed.items() if name == own or name.startswith("weights.")}


def read_sidecar(directory: Path) -> Sidecar:
    """What an engine says it is. Raises BackendError when the sidecar is missing or damaged."""
    file = directory / SIDECAR
    try:
        content = read_file(file)
        raw = load_json(content)
        if (schema := as_type(raw, HasSchema, content).schema) != SCHEMA:
            raise BackendError(f"{file} has schema {schema}, this version reads {SCHEMA}; {rebuild(directory)}")
        return as_type(raw, Sidecar, content)
    except FileNotFoundError:
        raise BackendError(f"{directory} has no {SIDECAR}, so its build did not finish; {rebuild(directory)}") from None
    except (OSError, Misfit) as error:
        raise BackendError(f"{file} is damaged ({error}); {rebuild(directory)}") from None


def load_plan(bundle: Path, wanted: EngineSpec) -> bytes:
    """The serialized engine that fits `wanted` exactly.

    Raises:
        BackendError: no such engine (naming how the nearest one differs), another's engine under this key, or a plan
            whose bytes have changed.
    """
    directory = wanted.directory(bundle)
    if not directory.is_dir():
        raise BackendError(_absent(bundle, wanted))
    sidecar = read_sidecar(directory)
    if (found := sidecar.spec) != wanted:
        raise BackendError(
            f"{directory} holds another engine: {', '.join(differences(found, wanted))}; {rebuild(directory)}"
        )
    plan = directory / PLAN
    if not plan.is_file():
        raise BackendError(f"{plan} is missing; {rebuild(directory)}")
    if sha256(plan) != sidecar.plan_sha256:
        raise BackendError(f"{plan} has changed since it was built (SHA-256 differs); {rebuild(directory)}")
    return plan.read_bytes()


def differences(found: EngineSpec, wanted: EngineSpec) -> list[str]:
    """In what an engine differs from the one wanted, one phrase each."""
    phrases = []
    for field in fields(EngineSpec):
        have, want = getattr(found, field.name), getattr(wanted, field.name)
        if have == want:
            continue
        if field.name == "files":
            changed = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
            phrases.append(f"built from another {' and '.join(changed)}")
        elif field.name == "shapes":
            names = [name for name in want if have.get(name) != want[name]]
            have = {name: have[name] for name in names if name in have}
            phrases.append(f"built for {shapes_text(have)}, not {shapes_text({name: want[name] for name in names})}")
        else:
            phrases.append(f"{field.name} is {have}, not {want}")
    return phrases


def found_engines(bundle: Path, backend: str) -> list[Sidecar]:
    """What the engines of a bundle say they are; damaged ones are left out."""
    found = []
    for file in sorted((bundle / "engines" / backend).glob(f"*/{SIDECAR}")):
        try:
            found.append(read_sidecar(file.parent))
        except BackendError:
            continue
    return found


def _absent(bundle: Path, wanted: EngineSpec) -> str:
    """The message for an engine that is not there: with the nearest engine of the same graph, if there is one."""
    nearest: list[str] = []
    for found in (sidecar.spec for sidecar in found_engines(bundle, wanted.backend)):
        if found.graph == wanted.graph:
            phrases = differences(found, wanted)
            nearest = phrases if not nearest or len(phrases) < len(nearest) else nearest
    detail = f" (the nearest is stale or foreign: {'; '.join(nearest)})" if nearest else ""
    return f"{bundle} has no engine of {wanted}{detail}; {rebuild(wanted.directory(bundle), wanted)}"


def rebuild(directory: Path, wanted: EngineSpec | None = None) -> str:
    """How to get an engine that lies, or is to lie, in a directory `engines/<backend>/<key>` of a bundle."""
    bundle, backend = directory.parents[2], directory.parent.name
    command = f"gd-export --bundle {bundle} --engine {backend.replace('_', '-')}"
    if wanted:
        rows = next(iter(wanted.shapes.values()))[0]
        command += f" --sm {wanted.device[3:]}" if wanted.device.startswith("sm_") else ""
        command += " --fp8" if wanted.precision == IN_FP8 else ""
        command += f" --batch {rows // 2 if wanted.graph == CONTEXT else rows}"
        if wanted.shapes.get("query_valid", [0, OBJECTS])[1] != OBJECTS:
            command += f" --objects {wanted.shapes['query_valid'][1]}"
        manifest = read_manifest(bundle)
        cells = [side // manifest.vae_scale_factor for side in manifest.image_size]
        if (latents := wanted.shapes.get("latents", cells)[-2:]) != cells:
            command += " --size " + "x".join(str(side * manifest.vae_scale_factor) for side in latents)
    return f"build it with {command}"
