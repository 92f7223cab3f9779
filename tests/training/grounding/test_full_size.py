"""The whole training at Stable Diffusion 1.5's sizes, with a detector of COCO's, as a user with 16 GB runs it."""

import resource
import subprocess
import sys

import pytest
from helpers.detector import save_large_mask2former
from helpers.sd15 import save_base

from grounded_diffusion.engine.prompts.vocabulary import built_in
from grounded_diffusion.training.checkpoint import load_checkpoint

LIMIT = 16e9  # bytes


def command(module, *arguments):
    """Run a command of the project; its peak memory counts among this process's children."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"grounded_diffusion.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_steps_of_a_released_head_within_16_gb(tiny_checkpoint, tmp_path):
    from transformers import CLIPTokenizer

    base, bundle, detector, examples, out = (tmp_path / n for n in ("sd15", "bundle", "detector", "examples", "out"))
    save_base(base, CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer"))
    save_large_mask2former(detector, built_in("coco").names)
    command("export.cli", "--base", base, "--head", "untrained", "--no-verify", "--out", bundle)
    made = command(
        "training.cli", "examples", "--model", bundle, "--detector", detector, "--vocabulary", "coco", "--split", 1,
        "--examples", 4, "--steps", 1, "--batch", 1, "--score", 0, "--out", examples,
    )  # fmt: skip
    assert "s/mask" in made
    trained = command(
        "training.cli", "head", "--base", base, "--examples", examples, "--out", out, "--device", "cpu",
        "--iterations", 2, "--batch", 1, "--zero-masks", "trust", "--validate-every", 0, "--validation", 0,
    )  # fmt: skip
    assert "2/2 loss" in trained
    assert load_checkpoint(out).head.config.variant == "released"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < LIMIT, f"peak memory {peak / 1e9:.1f} GB"
