"""What a batch on a device leaves in host memory, and what its flags say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from grounded_diffusion.bundle import PRESENCE
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult, Denoised, probability
from grounded_diffusion.engine.sampling.denoise import not_finite
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.kernels import MaskResult

MAX_ROWS = 1024  # of a schedule: 1000 training timesteps, and one call more with PNDM
MASKS, PIXELS = MAX_ROWS, MAX_ROWS + 1  # rows of the flags after those of the steps
FLAG_ROWS = MAX_ROWS + 2


def unpack(request: BatchRequest, arrays: Mapping[str, np.ndarray]) -> BatchResult:
    """What a device has left in host memory, without its padding, copied out.

    Args:
        arrays: latents, mask_logits, captured, pixels, labels, bits, area, box and score of a bucket of sizes,
            and presence where the model tells it.
    """
    batch, objects = request.conditioning.query_valid.shape
    width = request.size[1]
    real = {name: array[:batch] for name, array in arrays.items()}
    # The bits of a uint32 word are 32 neighbouring pixels, the lowest first: on a little-endian host its bytes are too.
    packed = np.ascontiguousarray(real["bits"][:, :objects]).view(np.uint8)
    masks = MaskResult(
        labels=real["labels"].copy(),
        masks=np.unpackbits(packed, axis=-1, count=width, bitorder="little").view(np.bool_),
        **{name: real[name][:, :objects].copy() for name in ("area", "box", "score")},
    )
    logits = real["mask_logits"][:, :objects].astype(np.float32)
    timestep = request.schedule.rows[request.capture].timestep
    presence = probability(real[PRESENCE][:, :objects]) if PRESENCE in real else None
    denoised = Denoised(real["latents"].copy(), logits, timestep, real["captured"].astype(np.float32), presence)
    return BatchResult(real["pixels"].copy(), masks, denoised)


def first_failure(request: BatchRequest, flags: np.ndarray) -> NumericsError | None:
    """The first number that was not finite, as `denoise` would have met it.

    Args:
        flags: uint8 [FLAG_ROWS,B], not 0 where the latents after a step, the mask logits or the pixels are not finite.
    """
    rows, batch = len(request.schedule.rows), len(request.noise)
    flags = flags[:, :batch] != 0
    steps = np.flatnonzero(flags[:rows].any(1))
    first = int(steps[0]) if len(steps) else rows
    if flags[MASKS].any() and request.capture <= first:
        row, stage = MASKS, f"mask logits at step {request.capture + 1} of {rows}"
    elif first < rows:
        row, stage = first, f"latents at step {first + 1} of {rows}"
    elif flags[PIXELS].any():
        row, stage = PIXELS, "pixels"
    else:
        return None
    return not_finite(request.sample_names[int(np.argmax(flags[row]))], stage)
