"""Build TensorRT engines from a bundle's graphs: one code path for `tensorrt` and `tensorrt_rtx`.

TensorRT-RTX builds for a named GPU architecture on a machine without a GPU; TensorRT for the GPU it runs on. Networks
are strongly typed (the precision is in the ONNX), and every engine has one static profile: dynamic ones are slower
and fail at shapes off their optimum.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from grounded_diffusion.bundle import GRAPH_IO, GRAPHS, Bundle, sha256
from grounded_diffusion.engine.engine_file import BACKENDS, PLAN, SCHEMA, SIDECAR, EngineSpec, bundle_files, load_plan
from grounded_diffusion.errors import BackendError, UsageError

PACKAGES = {"tensorrt": "grounded-diffusion[tensorrt]", "tensorrt_rtx": "grounded-diffusion[rtx]"}
# TF32 would round FP32 graphs to 10 bits of mantissa: far from the 1e-5 that exported graphs hold.
FLAGS: dict[str, Any] = {"tf32": False}

Progress = Callable[[str, int, int], None]
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one static profile.

    Attributes:
        batch: images (B); guided graphs take 2B rows.
        objects: queries per image (O); fewer are padded as not valid.
        image_size: (H, W) in pixels; None takes the bundle's own.
    """

    batch: int
    objects: int = 8
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.objects < 1:
            raise UsageError(f"batch and objects must be at least 1, not {self.batch} and {self.objects}")


def profile_shapes(bundle: Bundle, graph: str, bucket: Bucket) -> dict[str, list[int]]:
    """Shape of every input of a graph in a bucket. Raises UsageError for an image size the model cannot take."""
    manifest = bundle.manifest
    height, width = bucket.image_size or manifest.image_size
    if height % manifest.size_multiple or width % manifest.size_multiple or min(height, width) < 1:
        raise UsageError(f"{height}x{width} is not a multiple of {manifest.size_multiple}, as this model needs")
    size = {
        "B": bucket.batch,
        "N": 2 * bucket.batch,
        "O": bucket.objects,
        "L": manifest.context_length,
        "D": manifest.context_dim,
        "h": height // manifest.vae_scale_factor,
        "w": width // manifest.vae_scale_factor,
    }
    inputs, _ = GRAPH_IO[graph]
    return {name: [size[s] if s in size else int(s) for s in shape.split(",")] for name, shape in inputs.items()}


def load_module(backend: str) -> ModuleType:
    """The Python module `tensorrt` or `tensorrt_rtx`. Raises BackendError with the pip line when it is not there."""
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend}; choose one of {', '.join(BACKENDS)}")
    try:
        return importlib.import_module(backend)
    except ImportError as error:
        raise BackendError(f"{backend} cannot be imported ({error}); pip install '{PACKAGES[backend]}'") from None


def target(trt: ModuleType, backend: str, sm: int | None) -> str:
    """Name of the device to build for, as EngineSpec has it.

    Raises:
        BackendError: an architecture TensorRT-RTX does not list, or no GPU for TensorRT to build on.
    """
    if backend == "tensorrt_rtx":
        known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        if sm not in known:
            raise BackendError(f"tensorrt_rtx {trt.__version__} builds for --sm {', '.join(map(str, known))}, not {sm}")
        return f"sm_{sm}"
    try:
        from cuda.core import Device

        device = Device(0)
        name, arch = device.name, int(device.arch)
    except Exception as error:  # ImportError, or cuda-core's own class for a missing driver or device
        raise BackendError(
            f"tensorrt builds on the GPU it is to run on, and there is none here ({error}); --engine tensorrt-rtx "
            "builds without one"
        ) from None
    if sm not in (None, arch):
        raise BackendError(f"tensorrt builds for the GPU at hand, {name} (--sm {arch}), not --sm {sm}")
    return f"{name} (sm_{arch})"


def engine_spec(bundle: Bundle, graph: str, backend: str, sm: int | None, bucket: Bucket) -> EngineSpec:
    """What the engine of one graph, device and bucket would be; building nothing."""
    trt = load_module(backend)
    return EngineSpec(
        graph=graph,
        backend=backend,
        version=trt.__version__,
        device=target(trt, backend, sm),
        shapes=profile_shapes(bundle, graph, bucket),
        precision=bundle.manifest.precision,
        flags=dict(FLAGS),
        files=bundle_files(bundle, graph),
    )


def build_engines(
    bundle: Bundle,
    backend: str,
    *,
    sms: Sequence[int | None],
    buckets: Sequence[Bucket],
    graphs: Sequence[str] = GRAPHS,
    progress: Progress | None = None,
    report: Report | None = None,
) -> list[EngineSpec]:
    """Build every engine that the bundle does not hold yet, for each architecture, bucket and graph.

    Args:
        sms: architectures such as 86; (None,) for TensorRT, which takes the GPU at hand.
        progress: called with (phase, steps done, steps) as the builder goes on.
        report: called with a line for every engine, before and after.

    Raises:
        BackendError: the backend is not installed, knows no such device, or refuses a graph.
        UsageError: sizes the model cannot take.
    """
    specs = [engine_spec(bundle, graph, backend, sm, bucket) for sm in sms for bucket in buckets for graph in graphs]
    tell = report or (lambda line: None)
    for spec in specs:
        if _is_built(bundle.path, spec):
            tell(f"already there: {spec}")
            continue
        tell(f"building {spec}")
        start = time.monotonic()
        plan = build_plan(bundle, spec, progress)
        _install(bundle.path, spec, plan)
        tell(f"built in {time.monotonic() - start:.1f} s, {plan.nbytes / 1e6:.1f} MB")
    return specs


def _is_built(bundle: Path, spec: EngineSpec) -> bool:
    try:
        load_plan(bundle, spec)
    except BackendError:  # absent or damaged: either way it is built
        return False
    return True


def build_plan(bundle: Bundle, spec: EngineSpec, progress: Progress | None = None) -> memoryview:
    """The serialized engine of one spec. Raises BackendError with the builder's own first error."""
    _check_weights(bundle, spec.graph)
    trt = load_module(spec.backend)
    log = _logger(trt)
    builder = trt.Builder(log)
    # TensorRT 11 has nothing but strong typing, and may have dropped the flag that asks for it.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(bundle.file(spec.graph))):
        raise BackendError(f"{spec.backend} {spec.version} cannot parse {spec.graph}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if not spec.flags["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.backend == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__["SM" + spec.device.removeprefix("sm_")], 0)
    config.add_optimization_profile(_static_profile(builder, network, spec))
    monitor = _monitor(trt, progress) if progress else None
    if monitor:
        config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor and monitor.error:
        raise monitor.error
    if plan is None:
        raise BackendError(f"{spec.backend} cannot build {spec}: {log.first_error or 'no reason given'}")
    return memoryview(plan)


def _check_weights(bundle: Bundle, graph: str) -> None:
    """The weights a graph refers to must be those the key is made of."""
    model = onnx.load(bundle.file(graph), load_external_data=False)
    used = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    if missing := sorted(used - bundle_files(bundle, graph).keys()):
        raise BackendError(
            f"{graph} refers to {', '.join(missing)}, which the bundle does not list; run gd-export again"
        )


def _static_profile(builder: Any, network: Any, spec: EngineSpec) -> Any:
    profile = builder.create_optimization_profile()
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    if sorted(t.name for t in tensors) != sorted(spec.shapes):
        raise BackendError(f"{spec.graph} has inputs {[t.name for t in tensors]}, not {list(spec.shapes)}")
    for tensor in tensors:
        shape = spec.shapes[tensor.name]
        if len(tensor.shape) != len(shape) or any(f not in (-1, s) for f, s in zip(tensor.shape, shape, strict=True)):
            raise BackendError(f"{spec.graph} takes {tensor.name} {list(tensor.shape)}, not {shape}")
        profile.set_shape(tensor.name, shape, shape, shape)
    return profile


def _logger(trt: ModuleType) -> Any:
    """A logger that prints nothing and keeps the first error, which names the cause; later ones follow from it."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and not self.first_error:
                self.first_error = message

    return Logger()


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    """The builder's phases passed on. What the callback raises stops the build and is kept for the caller."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self.steps: dict[str, int] = {}

        def _tell(self, phase: str, done: int) -> bool:
            try:
                progress(phase, done, self.steps[phase])
            except BaseException as error:  # an exception must not cross the builder's C++ frames
                self.error = self.error or error
            return self.error is None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps[phase_name])

    return Monitor()


def _install(bundle: Path, spec: EngineSpec, plan: memoryview) -> None:
    """Write the engine's directory beside its place and rename it there, sidecar last; a damaged one is replaced."""
    directory = spec.directory(bundle)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".building-"))
    try:
        _write(staging / PLAN, plan)
        record = {"schema": SCHEMA, "spec": asdict(spec), "plan_sha256": sha256(staging / PLAN)}
        _write(staging / SIDECAR, json.dumps(record, indent=1, sort_keys=True).encode())
        staging.chmod(0o755)
        if directory.exists():
            shutil.rmtree(directory)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(file: Path, content: bytes | memoryview) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
