"""TensorRT and TensorRT-RTX on the device loop: engines from the bundle, contexts that share memory, no allocation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bundle import (
    CONTEXT,
    FP8,
    GPU,
    GPU_GRAPHS,
    TEXT_ENCODER,
    UNET,
    UNET_GROUNDED,
    VAE_DECODER,
    Bundle,
)
from grounded_diffusion.cache import cache_folder, write_cached
from grounded_diffusion.engine.backends.gpu.device import ALIGNMENT, DeviceMemoryError, Tensor
from grounded_diffusion.engine.backends.gpu.memory import Sizes, Streams, loop_bytes
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, load_module, profile_shapes, quiet_logger, spec_of
from grounded_diffusion.engine.backends.tensorrt.store import (
    OBJECTS,
    EngineMemory,
    EngineSpec,
    found_engines,
    load_plan,
)
from grounded_diffusion.engine.sampling.backend import Arrays
from grounded_diffusion.errors import BackendError


class TensorRT:
    """The engines of one bundle that fit this device, package and version.

    Args:
        backend: "tensorrt" or "tensorrt_rtx".
        device: a CudaDevice.
        variant: GPU, or FP8 for the bundle's UNets in FP8.

    Raises:
        BackendError: the package is not installed, or the bundle has no such UNets.
    """

    def __init__(self, bundle: Bundle, backend: str, device: Any, variant: str = GPU):
        if variant == FP8 and f"{FP8}{UNET}" not in bundle.manifest.files:
            raise BackendError(f"{bundle.path} has no UNets in fp8; gd-export --bundle {bundle.path} --fp8 adds them")
        self.trt = load_module(backend)
        self.bundle, self.backend, self.device, self.variant = bundle, backend, device, variant
        self.name = backend.replace("_", "-")
        rtx = backend == "tensorrt_rtx"
        self.target = f"sm_{device.arch}" if rtx else f"{device.name} (sm_{device.arch})"
        self.log = quiet_logger(self.trt)
        self.runtime = self.trt.Runtime(self.log)
        self._found = found_engines(bundle.path, backend)
        self._engines: dict[str, Any] = {}
        self._single: dict[str, tuple[dict[str, Tensor], Callable[[], None], TensorRTGraphs]] = {}

    def spec(self, graph: str, shapes: Mapping[str, list[int]]) -> EngineSpec:
        """What the engine of a graph at these shapes must be."""
        version = self.trt.__version__
        return spec_of(self.bundle, graph, self.backend, version, self.target, dict(shapes), self.variant)

    def shapes(self, graph: str) -> list[dict[str, list[int]]]:
        """Input shapes of the engines of a graph that may be loaded here."""
        found = [sidecar.spec for sidecar in self._found]
        return [spec.shapes for spec in found if spec.graph == graph and spec == self.spec(graph, spec.shapes)]

    def buckets(self, batch: int, objects: int, size: tuple[int, int]) -> list[tuple[int, int]]:
        """See `GraphRuntime.buckets`."""
        wanted = profile_shapes(self.bundle, UNET_GROUNDED, Bucket(batch, max(objects, OBJECTS), size))
        found = [shapes for shapes in self.shapes(UNET_GROUNDED) if shapes["latents"][1:] == wanted["latents"][1:]]
        valid = [shapes["query_valid"] for shapes in found]
        buckets = [(batch, held) for batch, held in valid if held >= objects]
        if not buckets:
            load_plan(self.bundle.path, self.spec(UNET_GROUNDED, wanted))  # raises: says what is there, and the command
        return buckets

    def memory(self, sizes: Sizes) -> int | None:
        """See `GraphRuntime.memory`: what the builder has planned, as engine.json has it."""
        known = {sidecar.spec.key: sidecar.memory for sidecar in self._found}
        found: dict[str, EngineMemory] = {}
        for graph in GPU_GRAPHS:
            shapes = profile_shapes(self.bundle, graph, Bucket(sizes.batch, sizes.objects, sizes.image))
            memory = known.get(self.spec(graph, shapes).key)
            if memory is None:
                return None
            found[graph] = memory
        looped = max(found[graph].activations for graph in (CONTEXT, UNET, UNET_GROUNDED))  # they share an arena
        others = sum(found[graph].activations for graph in (TEXT_ENCODER, VAE_DECODER))
        weights = sum(memory.weights for memory in found.values()) + found[UNET].weights  # and without guidance
        return loop_bytes(self.bundle, sizes) + weights + looped + others

    def engine(self, spec: EngineSpec) -> Any:
        """A deserialised engine. Raises BackendError, DeviceMemoryError."""
        if spec.key not in self._engines:
            plan = load_plan(self.bundle.path, spec)
            self.log.first_error = ""
            engine = self.runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise self.failure(f"cannot load {spec}")
            self._engines[spec.key] = engine
        return self._engines[spec.key]

    def failure(self, what: str) -> BackendError:
        """The error for a call that has returned nothing, with the library's own words."""
        reason = self.log.first_error or "no reason given"
        memory = "memory" in reason.lower() and ("alloc" in reason.lower() or "out of" in reason.lower())
        return (DeviceMemoryError if memory else BackendError)(f"{self.name} {what}: {reason}")

    def open(self, sizes: Sizes, streams: Streams) -> TensorRTGraphs:
        """See `GraphRuntime.open`."""
        bucket = Bucket(sizes.batch, sizes.objects, sizes.image)
        return TensorRTGraphs(self, {graph: profile_shapes(self.bundle, graph, bucket) for graph in GPU_GRAPHS})

    def run(self, graph: str, inputs: Mapping[str, np.ndarray], streams: Streams) -> Arrays:
        """See `GraphRuntime.run`. A UNet must fit; of others, rows beyond the engine's are run in turn."""
        given = {name: list(value.shape) for name, value in inputs.items()}
        rows, known = next(iter(given.values()))[0], self.shapes(graph)
        fits = [s for s in known if all(s.get(name, [0])[1:] == shape[1:] for name, shape in given.items())]
        exact = [s for s in fits if s == given]
        if not exact and (graph in (UNET, UNET_GROUNDED) or not fits):
            load_plan(self.bundle.path, self.spec(graph, given))  # raises
        count = lambda s: next(iter(s.values()))[0]
        larger = [s for s in fits if count(s) >= rows]
        shapes = exact[0] if exact else min(larger, key=count) if larger else max(fits, key=count)
        size, parts = count(shapes), []
        for start in range(0, rows, size):
            fill = np.minimum(np.arange(start, start + size), rows - 1)
            part = self._once(
                graph, shapes, inputs if exact else {n: v[fill] for n, v in inputs.items()}, streams.aside
            )
            parts.append({name: array[: rows - start] for name, array in part.items()})
        return {name: np.concatenate([part[name] for part in parts]).astype(np.float32) for name in parts[0]}

    def _once(self, graph: str, shapes: dict[str, list[int]], inputs: Mapping[str, np.ndarray], stream: Any) -> Arrays:
        """One run of an engine, from and to host memory."""
        spec, device = self.spec(graph, shapes), self.device
        if spec.key not in self._single:
            graphs = TensorRTGraphs(self, {graph: shapes})
            tensors = {}
            for name in (name for names in self.bundle.gpu_io(graph) for name in names):
                tensor = Tensor(0, graphs.shape(graph, name), graphs.dtype(graph, name))
                tensors[name] = Tensor(device.allocate(tensor.nbytes), tensor.shape, tensor.dtype)
            self._single[spec.key] = tensors, graphs.bind(graph, tensors, stream), graphs
        tensors, launch, _ = self._single[spec.key]
        kept = {name: np.ascontiguousarray(value, tensors[name].dtype) for name, value in inputs.items()}
        outputs = {name: np.empty(tensors[name].shape, tensors[name].dtype) for name in self.bundle.gpu_io(graph)[1]}
        for name, array in kept.items():
            device.copy(stream, tensors[name].pointer, array.ctypes.data, array.nbytes)
        launch()
        for name, array in outputs.items():
            device.copy(stream, array.ctypes.data, tensors[name].pointer, array.nbytes)
        done = device.event()
        device.record(done, stream)
        device.sync(done)
        return outputs

    def close(self) -> None:
        """See `GraphRuntime.close`."""
        for tensors, _, graphs in self._single.values():
            graphs.close()
            for tensor in tensors.values():
                self.device.free(tensor.pointer)
        self._single.clear()
        self._engines.clear()


class TensorRTGraphs:
    """See `Graphs`: execution contexts of one bucket. Those of one stream, which never run at once, share an arena."""

    def __init__(self, runtime: TensorRT, shapes: Mapping[str, dict[str, list[int]]]):
        self.runtime, self.bundle, self.shapes = runtime, runtime.bundle, shapes
        self.capturable = True
        self._contexts: dict[str, tuple[Any, list[object]]] = {}  # and the launch bound last
        self._arenas: dict[int, tuple[int, int]] = {}  # pointer and size, by stream
        self._pointers: list[int] = []
        self._caches: dict[Path, Any] = {}

    def _engine(self, graph: str, shapes: Mapping[str, list[int]] | None = None) -> Any:
        return self.runtime.engine(self.runtime.spec(graph, shapes or self.shapes[graph]))

    def dtype(self, graph: str, tensor: str) -> np.dtype:
        """See `Graphs.dtype`."""
        return np.dtype(self.runtime.trt.nptype(self._engine(graph).get_tensor_dtype(tensor)))

    def shape(self, graph: str, tensor: str) -> tuple[int, ...]:
        """Shape of an input or output in this bucket."""
        if tensor in self.shapes[graph]:
            return tuple(self.shapes[graph][tensor])
        return tuple(self._context(graph, self.shapes[graph])[0].get_tensor_shape(tensor))

    def mask_size(self) -> tuple[int, int]:
        """See `Graphs.mask_size`."""
        *_, height, width = self.shape(UNET_GROUNDED, "mask_logits")
        return height, width

    def _context(self, graph: str, shapes: Mapping[str, list[int]]) -> tuple[Any, list[object]]:
        """The context of a graph at these shapes, without device memory yet."""
        trt, spec = self.runtime.trt, self.runtime.spec(graph, shapes)
        if spec.key not in self._contexts:
            config = self.runtime.engine(spec).create_runtime_config()
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX, which compiles kernels on this machine
                self._remember(config, spec)
            context = self.runtime.engine(spec).create_execution_context(config)
            if context is None:
                raise self.runtime.failure(f"cannot make a context of {spec}")
            for name, shape in shapes.items():
                if not context.set_input_shape(name, tuple(shape)):
                    raise self.runtime.failure(f"refuses {name} of shape {shape}, which {spec} was built for")
            self._contexts[spec.key] = context, [None]
        return self._contexts[spec.key]

    def _remember(self, config: Any, spec: EngineSpec) -> None:
        """Give a context the kernels that were compiled for this engine before."""
        file = cache_folder() / "kernels" / f"{spec.key}.{self.runtime.device.arch}.rtx"
        cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            cache.deserialize(file.read_bytes())  # False, and nothing read, where driver or version are others
        config.set_runtime_cache(cache)
        self._caches[file] = cache

    def _arena(self, stream: Any, size: int) -> tuple[int, int]:
        """Memory for contexts on a stream. The first that is bound should be the largest."""
        key = int(stream.handle)
        if self._arenas.get(key, (0, -1))[1] < size:
            self._arenas[key] = self.runtime.device.allocate(max(size, ALIGNMENT)), size
            self._pointers.append(self._arenas[key][0])
        return self._arenas[key]

    def bind(self, graph: str, tensors: Mapping[str, Tensor], stream: Any) -> Callable[[], None]:
        """See `Graphs.bind`."""
        shapes = {name: list(tensors[name].shape) for name in self.bundle.gpu_io(graph)[0]}
        context, last = self._context(graph, shapes)
        engine = self._engine(graph, shapes)
        if last[0] is None:
            context.set_device_memory(*self._arena(stream, engine.device_memory_size_v2))
        handle, failure, this = int(stream.handle), self.runtime.failure, object()

        def launch() -> None:  # does not name itself: a cycle would keep the engine until it is collected
            if last[0] is not this:  # another binding of the same context
                for name, tensor in tensors.items():
                    if not context.set_tensor_address(name, tensor.pointer):
                        raise failure(f"refuses the memory of {name} in {graph}")
                last[0] = this
            if not context.execute_async_v3(handle):
                raise failure(f"failed in {graph} on {tensors['latents'].shape if 'latents' in tensors else shapes}")

        launch()  # compiles and allocates what it does once; a graph can be captured only afterwards
        done = self.runtime.device.event()
        self.runtime.device.record(done, stream)
        self.runtime.device.sync(done)
        if hasattr(context, "is_stream_capturable"):
            self.capturable = self.capturable and bool(context.is_stream_capturable(handle))
        self._save()
        return launch

    def _save(self) -> None:
        """Keep the kernels that TensorRT-RTX has compiled; a place that cannot be written only costs time."""
        for file, cache in self._caches.items():
            content = cache.serialize()
            with contextlib.suppress(OSError):
                if content is None or (file.is_file() and file.stat().st_size == content.nbytes):
                    continue
                write_cached(file, memoryview(content))

    def close(self) -> None:
        """See `Graphs.close`."""
        self._contexts.clear()
        for pointer in self._pointers:
            self.runtime.device.free(pointer)
        self._pointers, self._arenas = [], {}
