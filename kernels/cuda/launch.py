"""Launchers of the CUDA kernels on device pointers: no copies, no allocation, no synchronisation.

A pointer is an integer device address; its array is C-contiguous with the shape of the host wrapper's argument.
Every launch goes to the caller's stream and may be captured into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.errors import BackendError
from grounded_diffusion.kernels.cfg_step import StepCoefficients
from grounded_diffusion.kernels.cuda.nvrtc import STEMS, cubin
from grounded_diffusion.kernels.mask_epilogue import MAX_OBJECTS, MAX_SIDE, logit

MAX_TERMS = 8  # kMaxTerms of core/cfg_step.cuh
# struct StepCoefficients of core/cfg_step.cuh
COEFFICIENTS: Any = np.dtype(
    [(name, np.float32) for name in ("guidance", "cx", "co", "a", "b0", "n", "next_scale")]
    + [(name, np.int32) for name in ("head", "terms", "row")]
    + [("weight", np.float32, MAX_TERMS), ("slot", np.int32, MAX_TERMS)]
)
CUDA, DRIVER = 13000, "580"  # CUDA 13.0 and, by its release notes, the first driver for it
STATS_BYTES = 32  # struct Stats of mask_epilogue.cu, one per object
_THREADS = 256
_MAX_BLOCKS = 1 << 16  # the grid-stride loops take what is left
_SCAN_ROWS = 8  # kRows of mask_epilogue.cu


def pack_step(step: StepCoefficients, *, slots: int = 0, row: int = 0) -> np.ndarray:
    """One row of a schedule as the kernel reads it, [1] of COEFFICIENTS: concatenate the rows and upload them once.

    Args:
        slots: length of the history (0: none).
        row: the row of `bad` that latents which are not finite are reported in.
    """
    weights, past = step.history_terms(slots)
    if len(weights) > MAX_TERMS:
        raise ValueError(f"b reaches too many steps back; at most {MAX_TERMS} past terms are supported")
    packed = np.zeros(1, COEFFICIENTS)
    packed["guidance"] = 1.0 if step.guidance_scale is None else step.guidance_scale
    for name in ("cx", "co", "a", "n", "next_scale"):
        packed[name] = getattr(step, name)
    packed["b0"] = step.b[0]
    packed["head"] = step.head if slots else -1
    packed["terms"] = len(weights)
    packed["row"] = row
    packed["weight"][0, : len(weights)] = weights
    packed["slot"][0, : len(past)] = past
    return packed


@dataclass(frozen=True, slots=True)
class StepPointers:
    """Device addresses of one sampler step's arrays, as in `kernels.cfg_step`; those of 0 are left out.

    Attributes:
        coefficients: one row made by `pack_step`.
        history, noise: 0 where the row has none.
        bad: uint8 [rows, batch]; byte (row, b) becomes 1 where a new latent of image b is not finite.
    """

    coefficients: int
    model_output: int
    latents: int
    out_latents: int
    out_input: int
    history: int = 0
    noise: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True)
class MaskPointers:
    """Device addresses of the mask epilogue's arrays: outputs have the shapes and types of MaskResult.

    Attributes:
        stats: scratch of B * O * STATS_BYTES bytes.
        masks: bool [B, O, H, W], or 0 to leave it out.
        bits: uint32 [B, O, H, ceil(W / 32)] as `reference.pack_bits`, an eighth of the bytes, or 0 to leave it out.
        bad: uint8 [B] or 0; byte b becomes 1 where a logit of a valid object of image b is not finite.
    """

    logits: int
    valid: int
    labels: int
    area: int
    box: int
    score: int
    stats: int
    masks: int = 0
    bits: int = 0
    bad: int = 0


def check_driver() -> None:
    """Raise BackendError for a driver that is older than CUDA 13, which all packages here are built with."""
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    if version < CUDA:
        had = f"{version // 1000}.{version % 1000 // 10}"
        raise BackendError(f"the NVIDIA driver is for CUDA {had}; install driver {DRIVER} or newer, for CUDA 13")


class CudaKernels:
    """The kernels, loaded for one device."""

    def __init__(self, device_id: int = 0, cache: Path | None = None) -> None:
        """Load (compiling at first use) for the device's architecture and make the device current.

        Raises:
            BackendError: no CUDA device, or the kernels cannot be compiled for it.
        """
        try:
            from cuda.core import Device, ObjectCode

            self.device = Device(device_id)
            self.device.set_current()
        except Exception as error:  # ImportError, or cuda-core's own class for a missing driver or device
            raise BackendError(
                f"no CUDA device {device_id} ({error}); check nvidia-smi, pip install 'grounded-diffusion[gpu]'"
            ) from error
        check_driver()
        arch = f"sm_{self.device.arch}"
        code = {stem: ObjectCode.from_cubin(cubin(stem, arch, cache), name=stem) for stem in STEMS}
        names = {
            "cfg_step": ("cfg_step_f32", "cfg_step_f16"),
            "image_epilogue": ("image_epilogue_f32", "image_epilogue_f16"),
            "mask_epilogue": ("mask_begin", "mask_scan_f32", "mask_scan_f16", "mask_finish"),
        }
        self._kernels = {name: code[stem].get_kernel(name) for stem, all_ in names.items() for name in all_}
        for name, kernel in self._kernels.items():
            self._load(name, kernel)

    def _load(self, name: str, kernel: Any) -> None:
        """Bring a kernel's code onto the device: CUDA does it at the first launch, which may not be in a capture."""
        from cuda.bindings import driver

        error, function = driver.cuKernelGetFunction(kernel.handle)
        if not int(error):
            (error,) = driver.cuFuncLoad(function)
        if int(error):
            raise BackendError(f"{self.device.name} cannot load the kernel {name}: {error.name}; check nvidia-smi")

    def _launch(self, stream: Any, name: str, grid: int | tuple[int, ...], block: int | tuple[int, ...], *args: Any):
        from cuda.core import LaunchConfig, launch

        launch(stream, LaunchConfig(grid=grid, block=block), self._kernels[name], *args)

    def cfg_step(self, stream: Any, at: StepPointers, *, count: int, guided: bool, half: bool, batch: int = 1) -> None:
        """One sampler step.

        Args:
            stream: cuda.core.Stream.
            count: elements of the latents, B * 4 * h * w.
            guided: model_output holds 2B rows; out_input has B, which both halves see.
            half: model_output and out_input are float16. Latents, history and noise are always float32.
        """
        blocks = min(-(-count // (4 * _THREADS)), _MAX_BLOCKS)
        pointers = (at.coefficients, at.model_output, at.latents, at.history, at.noise, at.out_latents, at.out_input)
        flags = (at.bad, np.int32(batch), np.int64(count), np.int32(guided))
        self._launch(stream, "cfg_step_f16" if half else "cfg_step_f32", blocks, _THREADS, *pointers, *flags)

    def image_epilogue(
        self, stream: Any, image: int, out: int, *, batch: int, size: tuple[int, int], half: bool, bad: int = 0
    ) -> None:
        """float32 or float16 [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3].

        `bad` is uint8 [B] or 0; byte b becomes 1 where a value of image b is not finite.
        """
        pixels = size[0] * size[1]
        blocks = min(-(-batch * pixels // _THREADS), _MAX_BLOCKS)
        name = "image_epilogue_f16" if half else "image_epilogue_f32"
        self._launch(stream, name, blocks, _THREADS, image, out, bad, np.int32(batch), np.int64(pixels))

    def mask_epilogue(
        self,
        stream: Any,
        at: MaskPointers,
        *,
        shape: tuple[int, int, int, int],
        size: tuple[int, int],
        threshold: float = 0.5,
        half: bool,
    ) -> None:
        """Masks of a batch.

        Args:
            shape: (B, O, h, w) of the logits; at most 255 objects.
            size: (H, W); at most 16384 a side.
            half: the logits are float16.
        """
        batch, objects, low_h, low_w = shape
        height, width = size
        if objects > MAX_OBJECTS or max(size) > MAX_SIDE:
            raise ValueError(f"at most {MAX_OBJECTS} objects and {MAX_SIDE} pixels a side, not {objects} and {size}")
        count = np.int32(batch * objects)
        few = max(1, -(-batch * objects // _THREADS))
        self._launch(stream, "mask_begin", few, _THREADS, at.stats, count)
        grid = (-(-width // 32), -(-height // _SCAN_ROWS), batch)
        sizes = [np.int32(v) for v in (objects, low_h, low_w, height, width)]
        name = "mask_scan_f16" if half else "mask_scan_f32"
        pointers = (at.logits, at.valid, at.labels, at.masks, at.bits, at.stats, at.bad)
        self._launch(stream, name, grid, (32, _SCAN_ROWS), *pointers, *sizes, np.float32(logit(threshold)))
        self._launch(stream, "mask_finish", few, _THREADS, at.stats, at.area, at.box, at.score, count)
