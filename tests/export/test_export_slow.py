"""A model of Stable Diffusion 1.5's sizes with a head of the released layout: exported and verified within 24 GB."""

import resource

import pytest

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.export import cli


@pytest.mark.slow
def test_stable_diffusion_sizes_export_and_verify(sd15, tmp_path, capsys):
    out = str(tmp_path / "bundle")
    assert cli.main([*sd15, "--out", out]) == 0
    said = capsys.readouterr().out
    assert "mask IoU" in said
    assert "FAILED" not in said
    manifest = open_bundle(out).manifest
    assert manifest.image_size == (512, 512)
    assert manifest.size_multiple == 64
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 24e9, f"peak memory {peak / 1e9:.1f} GB"
