"""cfg_step on the host against its float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.errors import relative_l2

from grounded_diffusion.kernels import StepCoefficients, cfg_step, reference

SHAPES = [(1, 1), (7, 13), (16, 16), (33, 65)]
PLMS = [55 / 24, -59 / 24, 37 / 24, -9 / 24]  # the weights of PNDM's fourth-order step


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("guidance", [None, 1.0, 7.5])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_equals_reference(size, guidance, order):
    shape = (3, 4, *size)
    output = random(1, 3 if guidance is None else 6, *shape[1:])
    latents, history, noise = random(2, *shape), random(3, 3, *shape), random(4, *shape)
    step = StepCoefficients(
        guidance_scale=guidance, cx=0.4, co=0.9, a=1.013, b=PLMS[:order], head=1, n=0.3, next_scale=0.7
    )
    expected = reference.cfg_step(step, output, latents, history, noise)
    out_latents, out_input = np.full(shape, np.nan, np.float32), np.full(output.shape, np.nan, np.float32)
    got = cfg_step(step, output, latents, history, noise=noise, out_latents=out_latents, out_input=out_input)
    assert got[0] is out_latents
    assert got[1] is out_input
    for value, wanted in zip((*got, history), expected, strict=True):
        assert relative_l2(value, wanted) <= 1e-6


def test_whole_guided_trajectory_with_ring():
    """50 steps of a fourth-order solver in place, the history slot going round, stay with the float64 loop."""
    shape, slots = (2, 4, 9, 11), 3
    latents, exact = random(5, *shape), np.float64(random(5, *shape))
    history = np.full((slots, *shape), np.nan, np.float32)
    kept: list[np.ndarray] = []
    for i in range(50):
        output = random(100 + i, 4, *shape[1:])
        b = (0.05 * np.array(PLMS[: min(i, 3) + 1])).tolist()
        step = StepCoefficients(guidance_scale=7.5, cx=0.0, co=1.0, a=0.99, b=b, head=i % slots)
        cfg_step(step, output, latents, history, out_latents=latents)
        uncond, cond = np.split(np.float64(output), 2)
        kept.insert(0, uncond + 7.5 * (cond - uncond))
        exact = 0.99 * exact + sum(w * m for w, m in zip(b, kept, strict=False))
    assert relative_l2(latents, exact) <= 1e-6


def test_oldest_value_is_read_before_its_slot_is_written():
    shape = (1, 1, 1, 700)
    history = np.full((1, *shape), 5.0, np.float32)
    step = StepCoefficients(guidance_scale=None, cx=0.0, co=1.0, a=1.0, b=[10.0, 100.0])
    out, _ = cfg_step(step, np.full(shape, 2.0, np.float32), np.zeros(shape, np.float32), history)
    assert (out == 520.0).all()
    assert (history == 2.0).all()


def test_unused_history_and_noise_are_not_read():
    shape = (1, 4, 3, 5)
    history = np.full((3, *shape), np.nan, np.float32)
    step = StepCoefficients(guidance_scale=2.0, cx=0.1, co=1.0, a=1.0, b=[0.5, 0.0, 0.0], head=2)
    noise = np.full(shape, np.nan, np.float32)
    out, following = cfg_step(step, random(1, 2, *shape[1:]), random(2, *shape), history, noise=noise)
    assert np.isfinite(out).all()
    assert np.isfinite(following).all()
    assert np.isnan(history[:2]).all()
    assert np.isfinite(history[2]).all()


@pytest.mark.parametrize(("guidance", "rows"), [(None, 4), (3.0, 2)])
def test_next_input_rows_are_free_of_the_present_ones(guidance, rows):
    """A guidance interval goes from guided to unguided calls and back: the caller's buffer says which comes next."""
    output, latents = random(1, 2 if guidance is None else 4, 4, 5, 7), random(2, 2, 4, 5, 7)
    out_input = np.full((rows, 4, 5, 7), np.nan, np.float32)
    step = StepCoefficients(guidance_scale=guidance, cx=0.0, co=1.0, a=0.9, b=[0.2], next_scale=0.5)
    out, following = cfg_step(step, output, latents, None, out_input=out_input)
    for half in np.split(following, rows // 2):
        np.testing.assert_array_equal(half, out * np.float32(0.5))


def arguments(**changes):
    """Arguments of cfg_step that fit, with changes to them or to the step's coefficients."""
    given = dict(model_output=random(1, 4, 4, 3, 3), latents=random(2, 2, 4, 3, 3), history=random(3, 2, 2, 4, 3, 3))
    step = dict(guidance_scale=2.0, cx=0.0, co=1.0, a=1.0, b=[1.0], head=0, n=0.0)
    step |= {name: changes.pop(name) for name in step.keys() & changes.keys()}
    return {"step": StepCoefficients(**step)} | given | changes


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"latents": random(2, 2, 4, 3, 3).tolist()}, TypeError, "latents must be a numpy array"),
        ({"latents": np.zeros((2, 4, 3, 3))}, TypeError, "latents must be float32, not float64"),
        ({"guidance_scale": None}, ValueError, r"model_output must have shape \[2, 4, 3, 3\], not \[4, 4, 3, 3\]"),
        ({"latents": random(2, 2, 3, 3, 4).transpose(0, 3, 1, 2)}, ValueError, "latents must be C-contiguous"),
        ({"history": random(3, 2, 1, 4, 3, 3)}, ValueError, r"history must have shape \[2, 2, 4, 3, 3\]"),
        ({"b": []}, ValueError, "b must hold at least"),
        ({"b": [1, 1, 1, 1]}, ValueError, "b reaches 3 steps back, history has 2 slots"),
        ({"history": None, "b": [1, 1]}, ValueError, "history has 0 slots"),
        ({"head": 2}, ValueError, "head must be a slot of history, 0 to 1, not 2"),
        ({"n": 0.5}, ValueError, "so noise .* is needed"),
        ({"out_input": random(1, 3, 4, 3, 3)}, ValueError, r"out_input must have shape \[4, 4, 3, 3\]"),
    ],
)
def test_wrong_arguments_are_named(changes, error, says):
    with pytest.raises(error, match=says):
        cfg_step(**arguments(**changes))


def test_shifted_overlap_is_refused():
    memory = random(1, 3, 4, 3, 3)
    with pytest.raises(ValueError, match="out_latents overlaps latents"):
        cfg_step(**arguments(latents=memory[:2], out_latents=memory[1:]))
    frozen = random(1, 2, 4, 3, 3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out_latents is read-only"):
        cfg_step(**arguments(out_latents=frozen))
