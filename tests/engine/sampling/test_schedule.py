"""Every table against the diffusers scheduler of the same name, over the whole trajectory."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from helpers.errors import relative_l2

from grounded_diffusion.engine.sampling.schedule import SAMPLERS, build_schedule
from grounded_diffusion.errors import UsageError

TOLERANCE = 1e-5
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
DRAWING = {  # those that add noise, and the module that draws it
    "lcm": "diffusers.schedulers.scheduling_lcm",
    "euler-ancestral": "diffusers.schedulers.scheduling_euler_ancestral_discrete",
}
STABLE_DIFFUSION = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    skip_prk_steps=True,
    timestep_spacing="leading",
)


def model(latents, timestep):
    """A smooth made-up network; works on NumPy arrays and torch tensors alike."""
    tanh = torch.tanh if isinstance(latents, torch.Tensor) else np.tanh
    return 0.7 * tanh(1.3 * latents + 0.5) + 0.2 * latents + 0.3 * float(np.cos(float(timestep) / 150))


def diffusers_trajectory(sampler, config, steps, noise, step_noise):
    kept = CLASSES[sampler].extract_init_dict(config)[0]
    scheduler = CLASSES[sampler](**kept)
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(noise) * scheduler.init_noise_sigma
    trajectory = []
    for i, t in enumerate(scheduler.timesteps):
        output = model(scheduler.scale_model_input(latents, t), t)
        if sampler in DRAWING:
            with pytest.MonkeyPatch.context() as patch:
                drawn = torch.from_numpy(step_noise[i])
                patch.setattr(f"{DRAWING[sampler]}.randn_tensor", lambda *_, n=drawn, **__: n)
                latents = scheduler.step(output, t, latents, return_dict=False)[0]
        else:
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
        trajectory.append(latents.numpy())
    return scheduler, np.stack(trajectory)


def table_trajectory(schedule, noise, step_noise):
    latents, history, trajectory = noise * schedule.init_noise_sigma, [], []
    for i, row in enumerate(schedule.rows):
        output = model(latents * row.input_scale, row.timestep)
        history.insert(0, row.cx * latents + row.co * output)
        latents = row.a * latents + sum(w * m for w, m in zip(row.b, history, strict=False)) + row.n * step_noise[i]
        trajectory.append(latents)
    return np.stack(trajectory)


def compare(sampler, config, steps):
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((2, 4, 6, 6)).astype(np.float32)
    step_noise = rng.standard_normal((steps + 1, *noise.shape)).astype(np.float32)
    schedule = build_schedule(config, sampler, steps)
    scheduler, expected = diffusers_trajectory(sampler, config, steps, noise, step_noise)
    got = table_trajectory(schedule, noise.astype(np.float64), step_noise)
    assert len(schedule.rows) == len(scheduler.timesteps)
    assert np.allclose([row.timestep for row in schedule.rows], scheduler.timesteps.numpy(), atol=1e-3)
    error = relative_l2(got, expected)
    assert error <= TOLERANCE, f"relative L2 {error:.2e}"


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_table_equals_diffusers(sampler, prediction, spacing):
    config = STABLE_DIFFUSION | {"prediction_type": prediction, "timestep_spacing": spacing}
    if sampler in ("pndm", "euler-ancestral") and prediction == "sample":
        with pytest.raises(UsageError, match="prediction_type"):
            build_schedule(config, sampler, 20)
        return
    for steps in (1, 2, 3, 4, 5, 8, 14, 15, 20, 25, 50):
        compare(sampler, config, steps)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_beta_schedules(sampler, beta_schedule):
    config = STABLE_DIFFUSION | {"beta_schedule": beta_schedule, "prediction_type": "v_prediction"}
    compare(sampler, config | {"beta_start": 0.0001, "beta_end": 0.02}, 20)


def test_options_of_single_solvers():
    for offset, to_one in itertools.product((0, 1), (True, False)):
        for sampler in ("ddim", "pndm"):
            compare(sampler, STABLE_DIFFUSION | {"steps_offset": offset, "set_alpha_to_one": to_one}, 10)
    for final, steps in itertools.product(("zero", "sigma_min"), (6, 20)):
        config = STABLE_DIFFUSION | {"final_sigmas_type": final, "timestep_spacing": "linspace"}
        compare("euler", config, steps)
        for lower, euler_last in itertools.product((True, False), (True, False)):
            compare("dpmpp-2m", config | {"lower_order_final": lower, "euler_at_final": euler_last}, steps)
    compare("lcm", STABLE_DIFFUSION | {"original_inference_steps": 100, "timestep_scaling": 5.0}, 7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_silent_config_takes_the_class_defaults(sampler):
    config = {"clip_sample": False, "skip_prk_steps": True}
    compare(sampler, config, 10)


def test_capture_is_by_noise_level():
    ddim = build_schedule(STABLE_DIFFUSION, "ddim", 50)
    assert ddim.capture_index(1) == 49
    assert ddim.rows[49].timestep == 1
    assert ddim.rows[ddim.capture_index(85)].timestep == 81
    for sampler, steps in itertools.product(SAMPLERS, (4, 20)):
        schedule = build_schedule(STABLE_DIFFUSION, sampler, steps)
        chosen = schedule.rows[schedule.capture_index(300)]
        wanted = schedule.log_snr[300]
        assert abs(chosen.log_snr - wanted) == min(abs(row.log_snr - wanted) for row in schedule.rows)
    with pytest.raises(UsageError, match="capture timestep 1000"):
        ddim.capture_index(1000)


@pytest.mark.parametrize(
    ("sampler", "option"),
    [
        ("ddim", {"clip_sample": True}),
        ("ddim", {"thresholding": True}),
        ("ddim", {"rescale_betas_zero_snr": True}),
        ("ddim", {"trained_betas": [0.1, 0.2]}),
        ("ddim", {"beta_schedule": "exponential"}),
        ("ddim", {"prediction_type": "flow"}),
        ("ddim", {"beta_start": "small"}),
        ("ddim", {"num_train_timesteps": 10**30}),
        ("ddim", {"num_train_timesteps": 0}),
        ("ddim", {"beta_start": 0.9, "beta_end": 0.9}),
        ("ddim", {"beta_start": 0.0}),
        ("ddim", {"num_train_timesteps": 1000.5}),
        ("pndm", {"skip_prk_steps": False}),
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"timestep_type": "continuous"}),
        ("dpmpp-2m", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp-2m", {"solver_order": 3}),
        ("dpmpp-2m", {"lambda_min_clipped": -5.1}),
        ("lcm", {"an_option_of_next_year": 3}),
    ],
)
def test_unsupported_options_fail_by_name(sampler, option):
    with pytest.raises(UsageError, match=next(iter(option))):
        build_schedule(STABLE_DIFFUSION | option, sampler, 20)


def test_options_of_other_solvers_do_not_matter():
    build_schedule(STABLE_DIFFUSION | {"clip_sample": True}, "euler", 20)
    build_schedule(STABLE_DIFFUSION | {"skip_prk_steps": False, "use_karras_sigmas": True}, "ddim", 20)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", 0), ("ddim", 1001), ("ddim", 2.5), ("lcm", 51), ("ddim", 1000)]
)
def test_impossible_steps(sampler, steps):
    with pytest.raises(UsageError, match="steps"):
        build_schedule(STABLE_DIFFUSION, sampler, steps)


def test_spacing_beyond_the_training_range():
    with pytest.raises(UsageError, match="1000 steps do not fit"):  # leading with offset 1 would need timestep 1000
        build_schedule(STABLE_DIFFUSION, "ddim", 1000)


def test_unknown_sampler_lists_the_known():
    with pytest.raises(UsageError, match="dpmpp-2m"):
        build_schedule(STABLE_DIFFUSION, "heun", 20)
