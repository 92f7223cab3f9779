"""The coefficients of each solver. A solver is (levels, options, steps) -> (rows, standard deviation of the start).

Notation: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) at a row, primed at the row it leads to; x0 is the
predicted clean latent. Sigma-space solvers use s = sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grounded_diffusion.errors import UsageError


@dataclass(frozen=True, slots=True)
class Row:
    """One network call and the update after it; formulas in schedule.py.

    Attributes:
        timestep: what the network is told; fractional for Euler with linspace spacing.
        alpha_bar: signal power of the latents that go in.
        cx, co, a, b, n: coefficients; b[k] weighs m of k rows ago.
        input_scale: factor from the latents to the network's input.
    """

    timestep: float
    alpha_bar: float
    cx: float
    co: float
    a: float
    b: tuple[float, ...]
    n: float = 0.0
    input_scale: float = 1.0

    @property
    def log_snr(self) -> float:
        """log(alpha_bar / (1 - alpha_bar))."""
        return math.log(self.alpha_bar) - math.log1p(-self.alpha_bar)


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """Noise levels of the training timesteps; `alpha_bar` is [num_train_timesteps]."""

    alpha_bar: np.ndarray

    @property
    def log_snr(self) -> np.ndarray:
        return np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)

    @property
    def sigmas(self) -> np.ndarray:
        """Noise to signal, sigma / alpha."""
        return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    def before(self, timestep: int, options: Mapping[str, Any]) -> float:
        """alpha_bar of a timestep; below 0 that of the clean end."""
        if timestep >= 0:
            return float(self.alpha_bar[timestep])
        return 1.0 if options["set_alpha_to_one"] else float(self.alpha_bar[0])

    def check(self, timesteps: np.ndarray, steps: int) -> np.ndarray:
        """`timesteps` themselves, if the spacing has put all of them on the training range."""
        if len(timesteps) != steps or timesteps.min() < 0 or timesteps.max() > len(self.alpha_bar) - 1:
            raise UsageError(f"{steps} steps do not fit the model's {len(self.alpha_bar)} timesteps; use fewer")
        return timesteps


Table = tuple[list[Row], float]


def spaced(levels: NoiseLevels, options: Mapping[str, Any], steps: int, rounded: bool = True) -> np.ndarray:
    """Timesteps from noisy to clean, [steps] (Lin et al. 2024, Table 2)."""
    if given := options.get("timesteps"):
        if steps != len(given):
            raise UsageError(f"the model's schedule is given whole, {len(given)} steps; {steps} cannot be had of it")
        return levels.check(np.array(given), steps)
    trained, spacing = len(levels.alpha_bar), options["timestep_spacing"]
    if spacing == "linspace":
        timesteps = np.linspace(0, trained - 1, steps)[::-1]
        timesteps = timesteps.round() if rounded else timesteps
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (trained // steps) + options["steps_offset"]
    else:
        timesteps = np.arange(trained, 0, -trained / steps).round() - 1
    return levels.check(timesteps.astype(np.int64) if rounded else timesteps.astype(np.float64), steps)


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(cx, co) with x0 = cx * x + co * o."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":  # Salimans & Ho 2022, appendix D
        return alpha, -sigma
    return 0.0, 1.0


def ddim(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """DDIM with eta 0 (Song et al. 2021, Eq. 12): x' = alpha' x0 + sigma' epsilon, in terms of x and o."""
    stride, timesteps = len(levels.alpha_bar) // steps, spaced(levels, options, steps).tolist()
    following = [*timesteps[1:], -1] if options["timesteps"] else [t - stride for t in timesteps]
    rows = []
    for t, to in zip(timesteps, following, strict=True):
        now, after = float(levels.alpha_bar[t]), levels.before(to, options)
        alpha, sigma, alpha_, sigma_ = math.sqrt(now), math.sqrt(1 - now), math.sqrt(after), math.sqrt(1 - after)
        if options["prediction_type"] == "epsilon":
            a, b = alpha_ / alpha, sigma_ - alpha_ * sigma / alpha
        elif options["prediction_type"] == "v_prediction":
            a, b = alpha_ * alpha + sigma_ * sigma, sigma_ * alpha - alpha_ * sigma
        else:
            a, b = sigma_ / sigma, alpha_ - sigma_ * alpha / sigma
        rows.append(Row(t, now, 0.0, 1.0, a, (b,)))
    return rows, 1.0


def pndm(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """PLMS (Liu et al. 2022, Eq. 9 and 12) without the Runge-Kutta start; the second timestep is visited twice.

    Row 0 goes to the second timestep and row 1 corrects it, starting again from row 0's latents x0. Those are
    x0 = (x1 - B0 m0) / A0, so the repeated step is linear in x1, m0 and m1, like all others.
    """
    if options["prediction_type"] == "sample":
        raise UsageError("sampler pndm supports prediction_type 'epsilon' or 'v_prediction', the model has 'sample'")
    stride = len(levels.alpha_bar) // steps

    def step(t: int, to: int) -> tuple[float, float]:
        """(A, B) of x' = A x + B o from timestep t to `to`."""
        if t >= len(levels.alpha_bar):
            raise UsageError(f"sampler pndm cannot take {steps} steps with the model's timestep spacing; try ddim")
        now, after = float(levels.alpha_bar[t]), levels.before(to, options)
        slope = (after - now) / (now * math.sqrt(1 - after) + math.sqrt(now * (1 - now) * after))
        a = math.sqrt(after / now)
        if options["prediction_type"] == "epsilon":
            return a, -slope
        return a - slope * math.sqrt(1 - now), -slope * math.sqrt(now)

    t = spaced(levels, options, steps).tolist()
    a0, b0 = step(t[0], t[0] - stride)
    rows = [Row(t[0], float(levels.alpha_bar[t[0]]), 0.0, 1.0, a0, (b0,))]
    # Adams-Bashforth weights over m; row 1 is no part of the history, hence the zeros.
    weights = [(3 / 2, 0.0, -1 / 2), (23 / 12, -16 / 12, 0.0, 5 / 12), (55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24)]
    weights += [(55 / 24, -59 / 24, 37 / 24, -9 / 24)] * max(0, steps - 4)
    for i, now in enumerate(t[1:]):
        alpha_bar = float(levels.alpha_bar[now])
        if i == 0:
            a, b = step(now + stride, now)
            rows.append(Row(now, alpha_bar, 0.0, 1.0, a / a0, (b / 2, b / 2 - a / a0 * b0)))
        a, b = step(now, now - stride)
        rows.append(Row(now, alpha_bar, 0.0, 1.0, a, tuple(b * w for w in weights[i])))
    return rows, 1.0


def final_sigma(levels: NoiseLevels, options: Mapping[str, Any]) -> float:
    return 0.0 if options["final_sigmas_type"] == "zero" else float(levels.sigmas[0])


def euler(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """Euler in sigma space (Karras et al. 2022, Algorithm 2 without churn): x' = x + (s' - s) (x - x0) / s."""
    return euler_steps(levels, options, steps, final_sigma(levels, options), ancestral=False)


def euler_ancestral(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """Euler to a level below the next, and noise back up to it, as in DDPM (Crowson 2022, k-diffusion)."""
    if options["prediction_type"] == "sample":
        raise UsageError(
            "sampler euler-ancestral supports prediction_type 'epsilon' or 'v_prediction', the model has 'sample'"
        )
    return euler_steps(levels, options, steps, 0.0, ancestral=True)


def euler_steps(levels: NoiseLevels, options: Mapping[str, Any], steps: int, final: float, *, ancestral: bool) -> Table:
    """Both; `final` is the noise level after the last step."""
    timesteps = spaced(levels, options, steps, rounded=False)
    sigmas = np.interp(timesteps, np.arange(len(levels.alpha_bar)), levels.sigmas)
    rows = []
    after = [*sigmas[1:].tolist(), final]
    for t, s, s_ in zip(timesteps.tolist(), sigmas.tolist(), after, strict=True):
        norm = math.sqrt(s * s + 1)
        if options["prediction_type"] == "epsilon":
            cx, co = 0.0, 1.0
        elif options["prediction_type"] == "v_prediction":
            cx, co = s / norm**2, 1 / norm
        else:
            cx, co = 1 / s, -1 / s
        up = s_ * math.sqrt(1 - (s_ / s) ** 2) if ancestral else 0.0
        down = s_**2 / s if ancestral else s_  # down^2 + up^2 = s'^2
        rows.append(Row(t, 1 / norm**2, cx, co, 1.0, (down - s,), n=up, input_scale=1 / norm))
    start = float(sigmas.max())
    return rows, math.sqrt(start**2 + 1) if options["timestep_spacing"] == "leading" else start


def dpmpp_2m(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022, Algorithm 2); m is x0.

    diffusers spaces its timesteps as if there were one step more, except with trailing spacing.
    """
    if options["timestep_spacing"] == "trailing" or options["timesteps"]:
        timesteps = spaced(levels, options, steps)
    elif options["timestep_spacing"] == "leading" and len(levels.alpha_bar) // (steps + 1) < 1:
        raise UsageError(f"{steps} steps do not fit the model's {len(levels.alpha_bar)} timesteps; use fewer")
    else:
        timesteps = spaced(levels, options, steps + 1)[:-1]
    sigmas = [*levels.sigmas[timesteps].tolist(), final_sigma(levels, options)]
    few = options["lower_order_final"] and steps < 15  # diffusers' bound for falling back to first order
    rows: list[Row] = []
    for i, t in enumerate(timesteps.tolist()):
        s, s_ = sigmas[i], sigmas[i + 1]
        alpha, alpha_ = 1 / math.sqrt(s * s + 1), 1 / math.sqrt(s_ * s_ + 1)
        step = alpha_ * (1 - s_ / s)  # -alpha' (exp(-h) - 1), h the step in log(1 / s)
        last = i == steps - 1 and (options["euler_at_final"] or few or options["final_sigmas_type"] == "zero")
        b: tuple[float, ...] = (step,)
        if i and not last:
            correction = step / 2 * math.log(s / s_) / math.log(sigmas[i - 1] / s)
            b = (step + correction, -correction)
        cx, co = to_x0(options["prediction_type"], alpha, s * alpha)
        rows.append(Row(t, alpha**2, cx, co, s_ * alpha_ / (s * alpha), b))
    return rows, 1.0


def lcm(levels: NoiseLevels, options: Mapping[str, Any], steps: int) -> Table:
    """Multistep latent consistency sampling (Luo et al. 2023, Algorithm 3); m is the consistency function's value."""
    original = int(options["original_inference_steps"])
    if steps > original:
        raise UsageError(f"sampler lcm takes at most {original} steps (original_inference_steps), not {steps}")
    lattice = (np.arange(1, original + 1) * (len(levels.alpha_bar) // original) - 1)[::-1]
    picks = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)
    timesteps = levels.check(lattice[picks], steps).tolist()
    rows = []
    for i, t in enumerate(timesteps):
        now = float(levels.alpha_bar[t])
        cx, co = to_x0(options["prediction_type"], math.sqrt(now), math.sqrt(1 - now))
        scaled = t * options["timestep_scaling"]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)  # sigma_data = 0.5
        after = float(levels.alpha_bar[timesteps[i + 1]]) if i + 1 < steps else 1.0
        rows.append(Row(t, now, out * cx + skip, out * co, 0.0, (math.sqrt(after),), n=math.sqrt(1 - after)))
    return rows, 1.0


SOLVERS: dict[str, Callable[[NoiseLevels, Mapping[str, Any], int], Table]] = {
    "ddim": ddim,
    "pndm": pndm,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "dpmpp-2m": dpmpp_2m,
    "lcm": lcm,
}
