"""Batch and lanes: what is tried, what is chosen, and that it is remembered."""

import pytest

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.engine.backends.calibrate import BatchAndLanes, calibrate, candidates, choose
from grounded_diffusion.engine.sampling.options import Options

MODULE = "grounded_diffusion.engine.backends.calibrate"


def test_small_ones_first_and_memory_in_bounds():
    tried = list(candidates(Options(), 16 * 16, threads=4))
    assert tried[0] == BatchAndLanes(16, 1)
    assert {t.lanes for t in tried} == {1, 2, 4}
    assert {t.batch for t in tried} == {8, 16, 32}
    large = list(candidates(Options(), 64 * 64, threads=64))
    assert large[0] == BatchAndLanes(1, 1)
    assert all(t.lanes * t.batch <= 16 for t in large)
    assert {t.batch for t in candidates(Options(batch=3), 16 * 16, threads=2)} == {3}


def test_a_larger_one_must_be_worth_it():
    small, wide = BatchAndLanes(8, 1), BatchAndLanes(8, 2)
    assert choose({small: 100.0, BatchAndLanes(16, 1): 101.0, BatchAndLanes(32, 2): 101.4}) == small
    assert choose({small: 100.0, wide: 150.0, BatchAndLanes(16, 2): 151.0}) == wide


def test_measured_once_and_remembered(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(f"{MODULE}.TIMED", 0.05)
    bundle, lines = open_bundle(tiny_bundle), []
    first = calibrate(bundle, Options(), threads=2, report=lines.append)
    assert first.lanes in (1, 2)
    assert len(lines) >= 2
    assert "guided calls" in lines[0]
    monkeypatch.setattr(f"{MODULE}.measure", lambda *_: pytest.fail("measured again"))
    assert calibrate(bundle, Options(), threads=2) == first
    with pytest.raises(pytest.fail.Exception):
        calibrate(bundle, Options(size=128), threads=2)  # another size is another question
