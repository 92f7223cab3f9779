"""From one file of a real model's size, with random weights, to a verified bundle with the attention head."""

import re
import subprocess
import sys

import pytest
from helpers.families import SD1, SD2, SDXL, tiny_parts
from helpers.original_layout import original
from safetensors.torch import save_file
from torch import nn

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.families import FAMILIES

MEASURED = """
import resource, sys
from grounded_diffusion.export.cli import main
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


def export_file(folder, family, size):
    """(peak memory in bytes, what was said) of an export, in a process of its own, of a file in FP16."""
    parts = tiny_parts(family, size)
    parts["tokenizer"].save_pretrained(folder / "tokenizer")
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.half()
    tensors = {name: tensor.half() for name, tensor in original(parts, FAMILIES[family]).items()}
    save_file(tensors, folder / "model.safetensors")
    del parts, tensors
    given = ["--base", folder / "model.safetensors", "--tokenizer", folder / "tokenizer", "--out", folder / "bundle"]
    command = [sys.executable, "-c", MEASURED, *map(str, given), "--family", family]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return int(re.search(r"^peak (\d+)", done.stdout, re.MULTILINE)[1]), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size", "most"), [("sd1", SD1, 16e9), ("sd2", SD2, 16e9), ("sdxl", SDXL, 24e9)])
def test_a_file_of_real_size_becomes_a_bundle(family, size, most, tmp_path):
    peak, said = export_file(tmp_path, family, size)
    assert "mask IoU" in said
    assert "FAILED" not in said
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.head["variant"] == "attention"
    assert manifest.image_size == (FAMILIES[family].image_size,) * 2
    print(f"{family}: peak memory {peak / 1e9:.1f} GB")
    assert peak < most
