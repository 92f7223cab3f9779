"""Samplers as tables: every supported solver is linear in its history, so a schedule is a list of coefficients.

With x the latents and o the (guided) model output at a row:

    m  = cx * x + co * o                                what the solver remembers
    x' = a * x + b[0] * m + sum_k b[k] * (m of k rows ago) + n * noise

The tables reproduce diffusers' schedulers of the same name, built from the same `scheduler_config.json`; where that
file is silent, the class's own default holds. Computed once, in float64.

One option is our own: `timesteps`, the whole schedule of a model that was made for few steps, for ddim and dpmpp-2m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grounded_diffusion.engine.sampling.solvers import SOLVERS, NoiseLevels, Row
from grounded_diffusion.errors import UsageError

SAMPLERS = tuple(SOLVERS)

# Options every solver reads, with the defaults of diffusers' classes.
COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
SIGMA_SPACINGS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
# Defaults of each solver where they differ from COMMON, then the options of its own.
OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {"set_alpha_to_one": True, "clip_sample": False, "thresholding": False, "timesteps": None},
    "pndm": {"set_alpha_to_one": False, "skip_prk_steps": True},
    "euler": {
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
        **SIGMA_SPACINGS,
    },
    "euler-ancestral": {"timestep_spacing": "linspace"},
    "dpmpp-2m": {
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "euler_at_final": False,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "thresholding": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
        "timesteps": None,
        **SIGMA_SPACINGS,
    },
    "lcm": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "clip_sample": False,
        "thresholding": False,
    },
}
# Options with a choice; of every other one, outside NUMBERS, only the value above is supported.
CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "set_alpha_to_one": (True, False),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
}
NUMBERS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "steps_offset",
    "original_inference_steps",
    "timestep_scaling",
)
MOST_TIMESTEPS = 1_000_000  # that a model is trained at; the usual are 1000
# Only read together with an option that is refused anyway, or by solvers that are not here.
INERT = (
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "flow_shift",
    "time_shift_type",
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One sampler at one number of steps.

    Attributes:
        sampler: name of the solver.
        steps: number of steps asked for; PNDM has one row more.
        rows: the table, in the order of sampling.
        init_noise_sigma: standard deviation of the initial latents.
        log_snr: [num_train_timesteps], log(alpha_bar / (1 - alpha_bar)) of every training timestep.
    """

    sampler: str
    steps: int
    rows: tuple[Row, ...]
    init_noise_sigma: float
    log_snr: np.ndarray

    @property
    def history(self) -> int:
        """How many past values of m any row looks back on."""
        return max(len(row.b) for row in self.rows) - 1

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return any(row.n for row in self.rows)

    @property
    def progress(self) -> list[float]:
        """How far on the way from noise (0) to image (1) each row is, in training timesteps."""
        return [1 - row.timestep / (len(self.log_snr) - 1) for row in self.rows]

    def capture_index(self, capture_timestep: int) -> int:
        """The row whose noise level is nearest, in log-SNR, to a training timestep; of equal rows the last."""
        if not 0 <= capture_timestep < len(self.log_snr):
            raise UsageError(f"capture timestep {capture_timestep} is not one of 0 to {len(self.log_snr) - 1}")
        distance = [abs(row.log_snr - self.log_snr[capture_timestep]) for row in self.rows]
        return len(distance) - 1 - int(np.argmin(distance[::-1]))


def read_options(config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """The options of a diffusers scheduler config that a sampler reads. Raises UsageError for one it cannot honour."""
    options = COMMON | OPTIONS[sampler]
    known = set(COMMON).union(INERT, *OPTIONS.values())
    for name, value in config.items():
        if name.startswith("_"):
            continue
        if name not in known:
            raise UsageError(f"the model's scheduler has an unknown option {name} = {value!r}")
        if name not in options:
            continue
        if name in NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UsageError(f"the model's scheduler has {name} = {value!r}, which is not a number")
            if name == "num_train_timesteps" and not (value == int(value) and 1 <= value <= MOST_TIMESTEPS):
                raise UsageError(f"the model's scheduler has {name} = {value!r}; it must lie in 1 to {MOST_TIMESTEPS}")
        elif name == "timesteps":
            check_timesteps(value, int(config.get("num_train_timesteps", COMMON["num_train_timesteps"])))
        elif value not in (choices := CHOICES.get(name, (options[name],))) and (value or options[name]):
            supported = " or ".join(map(repr, choices))
            raise UsageError(f"sampler {sampler} supports {name} = {supported}, the model's scheduler has {value!r}")
        options[name] = value
    return options


def check_timesteps(value: Any, trained: int) -> None:
    """Raise UsageError unless these are the timesteps of a schedule that is given whole, from noisy to clean."""
    whole = isinstance(value, list | tuple) and all(type(t) is int and 0 <= t < trained for t in value)
    if not whole or not value or sorted(set(value), reverse=True) != list(value):
        raise UsageError(
            f"the model's scheduler has timesteps = {value!r}; they must be whole numbers below {trained}, falling"
        )


def training_alpha_bar(options: Mapping[str, Any]) -> np.ndarray:
    """Cumulative signal power of every training timestep, [num_train_timesteps] (DDPM, Ho et al. 2020, Eq. 4).

    Rounded to float32 where diffusers rounds: near the clean end 1 - alpha_bar keeps few digits, and the model was
    trained with those. Raises UsageError where no signal is left at the end.
    """
    count, start, end = int(options["num_train_timesteps"]), options["beta_start"], options["beta_end"]
    told = f"the model's scheduler has beta_start = {start!r} and beta_end = {end!r}"
    if not (0 < start < 1 and 0 < end < 1):
        raise UsageError(f"{told}; both must lie between 0 and 1")
    if options["beta_schedule"] == "linear":
        betas = np.linspace(start, end, count)
    elif options["beta_schedule"] == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    else:  # Nichol & Dhariwal 2021, Eq. 17, betas capped at 0.999
        cosine = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    alphas = np.float32(1) - betas.astype(np.float32)
    levels = np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)
    if not (levels[-1] > 0 and levels[0] < 1):
        raise UsageError(f"{told}; over {count} timesteps they leave no signal, or no noise")
    return levels


def build_schedule(config: Mapping[str, Any], sampler: str, steps: int) -> Schedule:
    """The table of a sampler for a diffusers scheduler config.

    Args:
        config: `scheduler_config.json` as a dict. Keys that start with "_" are ignored.
        sampler: one of SAMPLERS.
        steps: number of denoising steps, 1 to num_train_timesteps.

    Raises:
        UsageError: unknown sampler, impossible number of steps, or an option that cannot be honoured, by name.
    """
    if sampler not in SOLVERS:
        raise UsageError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    options = read_options(config, sampler)
    trained = int(options["num_train_timesteps"])
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= trained:
        raise UsageError(f"steps must be a whole number from 1 to {trained}, not {steps!r}")
    levels = NoiseLevels(training_alpha_bar(options))
    rows, init_noise_sigma = SOLVERS[sampler](levels, options, steps)
    return Schedule(sampler, steps, tuple(rows), init_noise_sigma, levels.log_snr)
