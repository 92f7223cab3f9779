"""What commands load: those that need no model load neither a runtime nor the pipeline."""

import json
import subprocess
import sys

import pytest

HEAVY = (
    "onnxruntime",
    "tokenizers",
    "grounded_diffusion.engine.pipeline.pipeline",
    "grounded_diffusion.engine.backends.open",
)
CODE = """
import json, sys
from {module} import main
try:
    status = main(sys.argv[1:])
except SystemExit as stopped:
    status = stopped.code
print(json.dumps([status, sorted(sys.modules)]))
"""


def modules_of(module, *arguments):
    """(exit status, names of what a command has loaded)."""
    code = CODE.format(module=f"grounded_diffusion.engine.cli.{module}")
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", ["prompts", "dataset"])
def test_help(command):
    status, loaded = modules_of(command, "--help")
    assert status == 0
    assert not set(HEAVY) & set(loaded)


def test_status(blobs):
    status, loaded = modules_of("dataset", "status", blobs.path)
    assert status == 0
    assert not set(HEAVY) & set(loaded)


def test_the_check_sees_what_is_heavy():
    _, loaded = modules_of("infer", "--help")
    assert "grounded_diffusion.engine.pipeline.pipeline" in loaded
