"""One sampler step in one pass: guidance, linear multistep update, history and the next network input.

With x the latents, u and c the unconditional and conditional halves of the model output:

    o  = u + guidance_scale * (c - u)          Ho & Salimans 2022, Eq. 6; o = model output when unguided
    m  = cx * x + co * o                       what the solver keeps: epsilon, x0 or a derivative
    x' = a * x + b[0] * m + sum_k b[k] * (m of k steps ago) + n * noise
    next input = next_scale * x'               once per half

Every supported solver is a table of these coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grounded_diffusion import _kernels
from grounded_diffusion.kernels.checks import check_apart, check_array, check_output


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """The numbers of one step, as in the module's formulas.

    Attributes:
        guidance_scale: weight of c - u; None when unguided (B rows of model output).
        cx, co, a, n, next_scale: coefficients.
        b: weight of m and of the values 1, 2, ... steps ago; at most one more than the history has slots.
        head: slot of the history to write; the value of k steps ago is at (head - k) mod K.
    """

    guidance_scale: float | None
    cx: float
    co: float
    a: float
    b: Sequence[float]
    head: int = 0
    n: float = 0.0
    next_scale: float = 1.0

    def history_terms(self, slots: int) -> tuple[list[float], list[int]]:
        """Weights and ring-buffer slots of the past terms in use: the value of k steps ago is at (head - k) mod slots.

        Terms of weight 0 are left out, so that a slot not yet written is never read. `slots` steps back is the
        slot about to be overwritten, which is read first: a ring of K slots serves K past values.
        """
        b, head = self.b, self.head
        if not b:
            raise ValueError("b must hold at least b[0], the weight of this step's own value")
        if len(b) - 1 > slots:
            raise ValueError(f"b reaches {len(b) - 1} steps back, history has {slots} slots; pass a longer history")
        if slots and not 0 <= head < slots:
            raise ValueError(f"head must be a slot of history, 0 to {slots - 1}, not {head}")
        used = [(float(weight), (head - k) % slots) for k, weight in enumerate(b) if k and weight]
        return [weight for weight, _ in used], [slot for _, slot in used]


def cfg_step(
    step: StepCoefficients,
    model_output: np.ndarray,
    latents: np.ndarray,
    history: np.ndarray | None,
    *,
    noise: np.ndarray | None = None,
    out_latents: np.ndarray | None = None,
    out_input: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Advance the latents by one step; arrays are float32 and C-contiguous.

    Args:
        step: the step's coefficients.
        model_output: [2B, ...], rows [unconditional x B; conditional x B], or [B, ...] when unguided.
        latents: [B, ...], x.
        history: [K, B, ...], ring buffer of past m; slot `step.head` receives this step's. None keeps nothing.
        noise: [B, ...]; needed only when `step.n` is not 0.
        out_latents: [B, ...], x'; may be `latents` itself.
        out_input: [2B, ...] or [B, ...], rows as the next network call wants them.

    Returns:
        (out_latents, out_input), the arrays given or fresh ones with as many rows as latents and model_output.

    Raises:
        TypeError, ValueError: an argument of another type, shape or layout, or overlapping memory.
    """
    f32 = (np.float32,)
    check_array(latents, "latents", f32, (None,) * getattr(latents, "ndim", 0))
    batch, *row = latents.shape
    rows = batch if step.guidance_scale is None else 2 * batch
    check_array(model_output, "model_output", f32, (rows, *row))
    read = {"model_output": model_output, "latents": latents}
    slots = 0
    if history is not None:
        slots = check_output(history, "history", np.float32, (len(history), *latents.shape)).shape[0]
    weights, past = step.history_terms(slots)
    if step.n:
        if noise is None:
            raise ValueError(f"n is {step.n}, so noise [{', '.join(map(str, latents.shape))}] is needed")
        read["noise"] = check_array(noise, "noise", f32, latents.shape)
    if out_input is not None and getattr(out_input, "ndim", 0) and len(out_input) in (batch, 2 * batch):
        rows = len(out_input)
    out_latents = check_output(out_latents, "out_latents", np.float32, latents.shape)
    out_input = check_output(out_input, "out_input", np.float32, (rows, *row))
    written = {"out_latents": out_latents, "out_input": out_input}
    check_apart(written if history is None else written | {"history": history}, read)
    _kernels.cfg_step(
        model_output,
        latents,
        history,
        noise if step.n else None,
        out_latents,
        out_input,
        1.0 if step.guidance_scale is None else step.guidance_scale,
        (step.cx, step.co, step.a, step.b[0], step.n, step.next_scale),
        weights,
        past,
        step.head,
    )
    return out_latents, out_input
