"""Build TensorRT engines from a bundle's graphs: one code path for `tensorrt` and `tensorrt_rtx`.

TensorRT-RTX builds for a named GPU architecture on a machine without a GPU; TensorRT for the GPU it runs on. Networks
are strongly typed (the precision is in the ONNX), and every engine has one static profile: dynamic ones are slower
and fail at shapes off their optimum.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import onnx

from grounded_diffusion.bundle import GPU, GPU_GRAPHS, UNET, Bundle, sha256
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, engine_spec, load_module, quiet_logger
from grounded_diffusion.engine.backends.tensorrt.store import (
    PLAN,
    SCHEMA,
    SIDECAR,
    EngineMemory,
    EngineSpec,
    Sidecar,
    load_plan,
)
from grounded_diffusion.errors import BackendError

Progress = Callable[[str, int, int], None]
Report = Callable[[str], None]


def build_engines(
    bundle: Bundle,
    backend: str,
    *,
    sms: Sequence[int | None],
    buckets: Sequence[Bucket],
    graphs: Sequence[str] = GPU_GRAPHS,
    variant: str = GPU,
    progress: Progress | None = None,
    report: Report | None = None,
) -> list[EngineSpec]:
    """Build every engine that the bundle does not hold yet, for each architecture, bucket and graph.

    Args:
        sms: architectures such as 86; (None,) for TensorRT, which takes the GPU at hand.
        variant: GPU, or FP8 for the UNets in FP8.
        progress: called with (phase, steps done, steps) as the builder goes on.
        report: called with a line for every engine, before and after.

    Raises:
        BackendError: the backend is not installed, knows no such device, or refuses a graph.
        UsageError: sizes the model cannot take.
    """
    specs = [
        engine_spec(bundle, graph, backend, sm, bucket, variant)
        for sm in sms
        for bucket in buckets
        for graph in graphs
        if bucket.guided or graph == UNET  # the other graphs know no unguided form
    ]
    tell = report or (lambda line: None)
    for spec in specs:
        if spec.directory(bundle.path).exists():
            try:
                load_plan(bundle.path, spec)
                tell(f"already there: {spec}")
                continue
            except BackendError as error:  # damaged or another's: it is replaced
                tell(f"refused: {error}")
        tell(f"building {spec}")
        start = time.monotonic()
        plan, memory = build_plan(bundle, spec, progress)
        _install(bundle.path, spec, plan, memory)
        needs = f", needs {(memory.weights + memory.activations) / 1e6:.1f} MB of the GPU" if memory else ""
        tell(f"built in {time.monotonic() - start:.1f} s, {plan.nbytes / 1e6:.1f} MB{needs}")
    return specs


def build_plan(
    bundle: Bundle, spec: EngineSpec, progress: Progress | None = None
) -> tuple[memoryview, EngineMemory | None]:
    """The serialized engine of one spec, and its memory. Raises BackendError with the builder's own first error."""
    _check_weights(bundle, spec)
    trt = load_module(spec.backend)
    log = quiet_logger(trt)
    builder = trt.Builder(log)
    # TensorRT 11 has nothing but strong typing, and may have dropped the flag that asks for it.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    content = bundle.variant(spec.variant, spec.graph).read_bytes()
    if not parser.parse(content, str(bundle.file(spec.graph))):  # weights lie beside the standard graph
        raise BackendError(f"{spec.backend} {spec.version} cannot parse {spec.graph}: {parser.get_error(0)}")
    config = builder.create_builder_config()
    if not spec.flags["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.flags["user_allocation"] and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX alone
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
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
    return memoryview(plan), log.memory


def _check_weights(bundle: Bundle, spec: EngineSpec) -> None:
    """The weights a graph refers to must be those the key is made of."""
    model = onnx.load(bundle.variant(spec.variant, spec.graph), load_external_data=False)
    used = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    if missing := sorted(used - spec.files.keys()):
        raise BackendError(
            f"{spec.graph} refers to {', '.join(missing)}, which the bundle does not list; run gd-export again"
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


def _install(bundle: Path, spec: EngineSpec, plan: memoryview, memory: EngineMemory | None) -> None:
    """Write the engine's directory beside its place and rename it there, sidecar last; a damaged one is replaced."""
    directory = spec.directory(bundle)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".building-"))
    try:
        _write(staging / PLAN, plan)
        sidecar = Sidecar(SCHEMA, spec, sha256(staging / PLAN), memory)
        _write(staging / SIDECAR, json.dumps(msgspec.to_builtins(sidecar), indent=1, sort_keys=True).encode())
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
