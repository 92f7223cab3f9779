"""Which engine a graph needs: its static shapes, the package's version and the device, as an EngineSpec."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from grounded_diffusion.bundle import FP8, GPU, SHARED_ROWS, UNET, VAE_DECODER, Bundle
from grounded_diffusion.engine.backends.tensorrt.store import (
    IN_FP8,
    OBJECTS,
    PACKAGES,
    EngineMemory,
    EngineSpec,
    bundle_files,
)
from grounded_diffusion.engine.sampling.batch import decoded_at_once
from grounded_diffusion.errors import BackendError, UsageError

FLAGS: dict[str, Any] = {
    "tf32": False,  # it would round FP32 graphs to 10 bits of mantissa: far from the 1e-5 that exported graphs hold
    "user_allocation": True,  # an engine that allocates by itself cannot be captured into a CUDA graph
}
MEMORY = re.compile(r"Total (Activation|Weights|Device Persistent) Memory: (\d+) bytes")  # what a builder logs


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of one static profile.

    Attributes:
        batch: images (B); both halves of guidance have 2B rows of keys and values.
        objects: queries per image (O); fewer are padded as not valid.
        image_size: (H, W) in pixels; None takes the bundle's own.
        guided: the plain UNet runs both halves; without, the conditional half alone, as outside a guidance interval.
    """

    batch: int
    objects: int = OBJECTS
    image_size: tuple[int, int] | None = None
    guided: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1 or self.objects < 1:
            raise UsageError(f"batch and objects must be at least 1, not {self.batch} and {self.objects}")


def profile_shapes(bundle: Bundle, graph: str, bucket: Bucket) -> dict[str, list[int]]:
    """Shape of every input of a graph in a bucket. Raises UsageError for an image size the model cannot take."""
    manifest = bundle.manifest
    height, width = bucket.image_size or manifest.image_size
    if height % manifest.size_multiple or width % manifest.size_multiple or min(height, width) < 1:
        raise UsageError(f"{height}x{width} is not a multiple of {manifest.size_multiple}, as this model needs")
    cells = (height // manifest.vae_scale_factor) * (width // manifest.vae_scale_factor)
    size = {
        SHARED_ROWS: bucket.batch,
        "B": decoded_at_once(bucket.batch, cells) if graph == VAE_DECODER else bucket.batch,
        "N": bucket.batch if graph == UNET and not bucket.guided else 2 * bucket.batch,
        "O": bucket.objects,
        "T": manifest.context_length,
        "L": manifest.context_rows,
        "D": manifest.context_dim,
        "h": height // manifest.vae_scale_factor,
        "w": width // manifest.vae_scale_factor,
    }
    inputs, _ = bundle.gpu_io(graph)
    return {name: [size[s] if s in size else int(s) for s in shape.split(",")] for name, shape in inputs.items()}


def load_module(backend: str) -> ModuleType:
    """The Python module `tensorrt` or `tensorrt_rtx`. Raises BackendError with the pip line when it is not there."""
    if backend not in PACKAGES:
        raise BackendError(f"there is no backend {backend}; choose one of {', '.join(PACKAGES)}")
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


def quiet_logger(trt: ModuleType) -> Any:
    """A logger that prints nothing and keeps the first error, which names the cause, and what a build says of memory.

    Later errors follow from the first. Where there is no GPU to open an engine on, only its builder's words tell its
    memory.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""
            self.told: dict[str, int] = {}  # bytes of memory

        @property
        def memory(self) -> EngineMemory | None:
            parts = [self.told.get(part) for part in ("Activation", "Weights", "Device Persistent")]
            known = [size for size in parts if size is not None]
            return EngineMemory(known[0], sum(known[1:])) if len(known) == len(parts) else None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR) and not self.first_error:
                self.first_error = message
            if found := MEMORY.fullmatch(message):
                self.told[found[1]] = int(found[2])

    return Logger()


def spec_of(
    bundle: Bundle, graph: str, backend: str, version: str, device: str, shapes: dict[str, list[int]],
    variant: str = GPU,
) -> EngineSpec:  # fmt: skip
    """What the engine of a graph at these shapes is, for a package's version and a device.

    Args:
        variant: GPU, or FP8 for the UNets in FP8; the other graphs are of GPU there, too.
    """
    small = variant == FP8 and f"{FP8}{graph}" in bundle.manifest.files
    return EngineSpec(
        graph=graph,
        backend=backend,
        version=version,
        device=device,
        shapes=shapes,
        precision=IN_FP8 if small else bundle.manifest.precision,
        flags=dict(FLAGS),
        files=bundle_files(bundle, graph, variant),
    )


def engine_spec(
    bundle: Bundle, graph: str, backend: str, sm: int | None, bucket: Bucket, variant: str = GPU
) -> EngineSpec:
    """What the engine of one graph, device and bucket would be; building nothing."""
    trt, shapes = load_module(backend), profile_shapes(bundle, graph, bucket)
    return spec_of(bundle, graph, backend, trt.__version__, target(trt, backend, sm), shapes, variant)
