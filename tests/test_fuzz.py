"""Hostile input ends in one line, never in a traceback. See helpers/fuzz.py."""

import pytest
from helpers.fuzz import fuzz
from helpers.fuzz_commands import COMMANDS, LIGHT


def test_commands_without_torch():
    counts = fuzz(600, seed=1, commands=LIGHT)
    assert counts.faults == []
    assert counts.inputs == sum(counts.status.values()) == 600
    assert counts.status[0] > 60  # some of it is sound
    assert counts.status[2] > 60


def test_every_command():
    counts = fuzz(100, seed=2)
    assert counts.faults == []


@pytest.mark.slow
def test_6000_inputs():
    assert fuzz(6000).faults == []


def test_a_fault_is_seen(monkeypatch):
    def broken(words):
        raise ZeroDivisionError

    monkeypatch.setattr(COMMANDS["gd-prompts"], "main", broken)
    counts = fuzz(3, commands=("gd-prompts",))
    assert counts.of("traceback") == 3
