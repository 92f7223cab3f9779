"""Which backend a run computes with: by name, by precision, by what is fastest, and as it was begun."""

import pytest

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.engine.backends import openvino_cpu
from grounded_diffusion.engine.backends.calibrate import BatchAndLanes
from grounded_diffusion.engine.backends.openvino_cpu import chip_precisions
from grounded_diffusion.engine.cli.infer import main
from grounded_diffusion.engine.runs import open as opening
from grounded_diffusion.engine.runs.config import RunConfig
from grounded_diffusion.errors import BackendError, UsageError

pytest.importorskip("openvino")
bf16 = pytest.mark.skipif("bf16" not in chip_precisions(), reason="this CPU has no bf16 instructions")


def choose(precision, samples=1, before=None, bundle=None, **more):
    """(backend, lines said)."""
    said = []
    config = RunConfig(out="out", prompts="a [dog]", precision=precision, **more)
    return opening.choose_backend(config, bundle, samples, before or {}, said.append, quick=False), said


def test_fp32_is_the_default_backend():
    assert choose(None) == ("onnxruntime", [])
    assert choose("fp32") == ("onnxruntime", ["computing in fp32 by onnxruntime"])


@bf16
def test_bf16_is_said_and_kept():
    assert choose("bf16") == ("openvino-bf16", ["computing in bf16 by openvino-bf16"])
    assert choose("fastest") == ("openvino-bf16", ["computing in bf16 by openvino-bf16"])
    assert choose("fastest", before={"backend": "openvino"}) == ("openvino", [])


@bf16
def test_the_fastest_is_measured_for_long_runs(tiny_bundle, monkeypatch):
    rates = {"onnxruntime": 5.0, "openvino": 7.0, "openvino-bf16": 6.0}
    monkeypatch.setattr(opening, "calibrate", lambda b, o, t, say, name: BatchAndLanes(1, 1, rates[name]))
    assert choose("fastest", 256, bundle=open_bundle(tiny_bundle))[0] == "openvino"


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(openvino_cpu, "load_openvino", lambda: (_ for _ in ()).throw(BackendError("not installed")))
    with pytest.raises(BackendError, match="nothing computes in bf16 here"):
        choose("bf16")
    assert choose("fastest")[0] == "onnxruntime"
    with pytest.raises(UsageError, match="there is no precision 'fp4'; choose one of fp32, bf16, int8, fastest"):
        choose("fp4")
    with pytest.raises(UsageError, match="give `backend` or `precision`, not both"):
        choose("fp32", backend="openvino")


@bf16
def test_a_run_goes_on_in_the_precision_it_was_begun_in(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = ["--model", str(tiny_bundle), "--out", str(tmp_path / "out"), "--prompt", "a [dog]", "--steps", "1"]
    assert main([*run, "--precision", "bf16"]) == 0
    assert main(run) == 2
    assert "backend was openvino-bf16, now onnxruntime" in capsys.readouterr().err
    assert main([*run, "--precision", "fastest"]) == 0
