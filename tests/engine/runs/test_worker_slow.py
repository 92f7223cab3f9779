"""What takes minutes: the writer does not hold the model back, memory stays flat, and SIGTERM on the shipped model."""

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import null_backend

from grounded_diffusion.engine.cli.infer import build_parser, config_of
from grounded_diffusion.engine.pipeline.shipped import shipped_bundle
from grounded_diffusion.engine.runs.monitor import Monitor
from grounded_diffusion.engine.runs.open import open_run
from grounded_diffusion.engine.runs.stop import Stop

NULL = Path(null_backend.__file__)
PROMPT = ["--prompt", "a photograph of a [dog] and a [cat]"]
PAIRS, IMAGES = 15, 16


def rate(pipe, out, *options):
    """Images per second of a run on an opened pipeline, from its first batch to its last record."""
    arguments = [*PROMPT, "--images-per-prompt", IMAGES, "--batch", 8, "--shard-size", 8, "--lanes", 1]
    args = build_parser().parse_args(
        [str(a) for a in [*arguments, *options, "--model", pipe.bundle.path, "--out", out]]
    )
    run = replace(open_run(config_of(args), print, Stop()), pipe=pipe)
    run.start()
    worker, monitor = run.worker(Monitor()), Monitor()
    worker.monitor = monitor
    started = time.monotonic()
    worker.run(run.shards)
    seconds = time.monotonic() - started
    assert monitor.accepted_images == IMAGES
    return IMAGES / seconds


@pytest.mark.slow
def test_the_writer_does_not_hold_the_model_back(tmp_path):
    """At least 97% of the null format's rate, alternating; the median of pairs, as other programs disturb some."""
    from grounded_diffusion.engine import GroundedPipeline

    pipe = GroundedPipeline.open(shipped_bundle())
    rate(pipe, tmp_path / "warm")
    ratios = []
    for pair in range(PAIRS):
        rates = {}
        for name in ("folder", "null") if pair % 2 else ("null", "folder"):
            rates[name] = rate(pipe, tmp_path / f"{name}{pair}", "--format", name)
        ratios.append(rates["folder"] / rates["null"])
        print(f"pair {pair}: {rates['null']:.2f} images/s without, {rates['folder']:.2f} with the writer")
    print(f"median ratio {statistics.median(ratios):.4f}, from {min(ratios):.4f} to {max(ratios):.4f}")
    assert statistics.median(ratios) >= 0.97


MEMORY = f"""
import resource, sys
sys.path.insert(0, {str(NULL.parent)!r})
import null_backend
from grounded_diffusion.engine.runs.monitor import Monitor
shard = Monitor.shard
def shard_and_memory(self, index):
    shard(self, index)
    print("memory", index, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
Monitor.shard = shard_and_memory
sys.exit(null_backend.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_memory_stays_flat(tiny_bundle, tmp_path):
    """The peak grows by less than 50 MB from sample 1,000 to 10,000, every prompt another one."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a photograph of a [dog] and a [cat] number {i}" for i in range(10_000)))
    options = ["--model", tiny_bundle, "--prompts", prompts, "--out", tmp_path / "out", "--steps", "1", "--batch", "16"]
    command = [sys.executable, "-c", MEMORY, *options, "--shard-size", "200", "--lanes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("memory")]
    print(f"peak {peaks[4] / 1024:.1f} MB after 1,000 samples, {peaks[-1] / 1024:.1f} MB after 10,000")
    assert len(peaks) == 50
    assert peaks[-1] - peaks[4] < 50 * 1024


@pytest.mark.slow
def test_sigterm_on_the_shipped_model(tmp_path):
    """Exit 75 within 10 seconds in the middle of a batch of the default size, and the same command goes on."""
    options = [
        *PROMPT,
        "--steps",
        "20",
        "--images-per-prompt",
        "256",
        "--shard-size",
        "64",
        "--model",
        shipped_bundle(),
    ]
    command = [sys.executable, "-m", "grounded_diffusion.engine.cli.infer", *options, "--out", tmp_path / "out"]
    for _ in range(2):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = len(list(tmp_path.glob("out/shards/0*.json")))
        while len(list(tmp_path.glob("out/shards/0*.json"))) == before and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert run.wait(60) == 75
        print(f"ended after {time.monotonic() - asked:.1f} s")
        assert time.monotonic() - asked < 10
        assert "interrupted by SIGTERM" in run.stderr.read()
    assert subprocess.run(command, check=False).returncode == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["accepted"] == 256
