"""Noise: reproducible, independent of the batch, and standard normal."""

import numpy as np

from grounded_diffusion.engine.sampling.noise import MAX_SEED, batch_normal, normal

GOLDEN = [-0.5091645, 0.2706529, -2.4380462, -0.5931661, -1.0953722, 0.7565053, -0.193026, 1.3969171]


def test_the_first_values_never_change():
    expected = np.array(GOLDEN, np.float32)
    assert np.allclose(normal(7, 3, (8,)), expected, rtol=0, atol=1e-6)


def test_batch_does_not_matter():
    keys = [(7, 0), (7, 1), (9, 0), (7, 5)]
    whole = batch_normal(keys, (4, 5, 3))
    assert whole.dtype == np.float32
    for key, row in zip(keys, whole, strict=True):
        assert np.array_equal(batch_normal([key], (4, 5, 3))[0], row)


def test_every_key_and_stream_has_its_own_noise():
    draws = [normal(s, d, (64,), k) for s in (0, 1, MAX_SEED) for d in (0, 1, 10**12) for k in (0, 1)]
    for i, a in enumerate(draws):
        assert all(not np.array_equal(a, b) for b in draws[:i])


def test_distribution():
    values = normal(3, 0, (4, 256, 256)).ravel().astype(np.float64)
    bound = 5 / np.sqrt(values.size)
    assert abs(values.mean()) < bound
    assert abs(values.var() - 1) < 2 * bound
    assert abs((values**3).mean()) < 4 * bound
    assert abs((values**4).mean() - 3) < 10 * bound
    assert abs((np.abs(values) < 1).mean() - 0.682689) < bound
    half = values.size // 2
    assert abs((values[:half] * values[half:]).mean()) < 2 * bound  # the two values of each Box-Muller pair
    assert np.isfinite(values).all()


def test_odd_sizes():
    assert normal(1, 2, (3, 3)).shape == (3, 3)
