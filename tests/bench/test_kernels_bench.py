"""The kernel bench: its bytes are those of the arrays, and its table says what was measured."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from grounded_diffusion.bench import kernels as bench
from grounded_diffusion.kernels import cfg_step, image_epilogue, mask_epilogue


@pytest.mark.parametrize(("batch", "side"), [(1, 64), (3, 128)])
def test_traffic_is_that_of_the_arrays(batch, side):
    given, moved = bench.inputs(batch, side), bench.traffic(batch, side)
    following = np.empty_like(given["latents"])
    new, _ = cfg_step(bench.STEP, given["output"], given["latents"], given["history"], out_input=following)
    history = 2 * given["history"].nbytes  # read, then written
    assert moved["cfg_step"] == sum(a.nbytes for a in (given["output"], given["latents"], new, following)) + history
    assert moved["image_epilogue"] == given["image"].nbytes + image_epilogue(given["image"]).nbytes
    masks = mask_epilogue(given["logits"], given["valid"], (side, side))
    assert moved["mask_epilogue"] == given["logits"].nbytes + masks.labels.nbytes + masks.masks.nbytes


def test_table_and_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "SIZES", ((1, 64),))
    monkeypatch.setattr(bench, "gpu_name", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "3", "--json", str(tmp_path / "rows.json")])
    bench.main()
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "rows.json").read_text())
    names = [row["name"] for row in record["rows"]]
    assert names == ["copy", "cfg_step", "image_epilogue", "mask_epilogue"]
    assert "no NVIDIA GPU: host only" in said
    assert all(name in said for name in names)
    assert "100%" in said
    assert all(0 < row["median_s"] < 1 and np.isfinite(row["spread_s"]) for row in record["rows"])
