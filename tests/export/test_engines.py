"""TensorRT-RTX engines of a real bundle, built without a GPU, and everything that must not be loaded."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
from types import SimpleNamespace

import onnx
import pytest

from grounded_diffusion.bundle import CONTEXT, GPU, GPU_GRAPHS, TEXT_ENCODER, UNET, UNET_GROUNDED, open_bundle
from grounded_diffusion.engine.backends.gpu.tensorrt import TensorRT
from grounded_diffusion.engine.backends.tensorrt.spec import Bucket, engine_spec, load_module, profile_shapes
from grounded_diffusion.engine.backends.tensorrt.store import PLAN, SIDECAR, load_plan, read_sidecar
from grounded_diffusion.errors import BackendError, UsageError
from grounded_diffusion.export import cli, engine_cli, engines
from grounded_diffusion.export.engines import build_engines
from grounded_diffusion.export.weights import WeightStore

RTX = "tensorrt_rtx"


@pytest.fixture(scope="module")
def built(tiny_bundle, tmp_path_factory):
    """A bundle with all its engines, the engines' specs, and the phases of the builder that were reported."""
    path = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tiny_bundle, path)
    seen: dict[str, list[tuple[int, int]]] = {}
    specs = build_engines(
        open_bundle(path), RTX, sms=[86], buckets=[Bucket(2, objects=3)],
        progress=lambda phase, done, steps: seen.setdefault(phase, []).append((done, steps)),
    )  # fmt: skip
    return path, specs, seen


@pytest.fixture
def text_engine(built, tmp_path):
    """A copy of the bundle with one engine, to damage: (path, spec, directory of the engine)."""
    path, specs, _ = built
    shutil.copytree(path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    spec = next(s for s in specs if s.graph == TEXT_ENCODER)
    shutil.copytree(spec.directory(path), spec.directory(tmp_path / "bundle"))
    return tmp_path / "bundle", spec, spec.directory(tmp_path / "bundle")


def test_every_graph_builds_and_loads(built):
    path, specs, seen = built
    assert [s.graph for s in specs] == list(GPU_GRAPHS)
    assert len({s.key for s in specs}) == len(GPU_GRAPHS)
    for spec in specs:
        assert len(load_plan(path, spec)) > 10_000, spec.graph
        assert read_sidecar(spec.directory(path)).spec == spec
        assert sorted(f.name for f in spec.directory(path).iterdir()) == [SIDECAR, PLAN]
    assert len(list((path / "engines" / RTX).iterdir())) == len(GPU_GRAPHS), "nothing half-built is left"
    assert seen
    assert all(steps[-1][0] == steps[-1][1] for steps in seen.values())


def test_engines_say_what_memory_they_need(built):
    """Weights are those of the graph, and the larger UNet needs more while it runs."""
    path, specs, _ = built
    memory = {spec.graph: read_sidecar(spec.directory(path)).memory for spec in specs}
    assert memory.keys() == set(GPU_GRAPHS)
    assert 0 < memory[CONTEXT].weights < memory[UNET].weights < memory[UNET_GROUNDED].weights
    assert 0 < memory[UNET].activations <= memory[UNET_GROUNDED].activations
    model = onnx.load(open_bundle(path).variant(GPU, UNET), load_external_data=False)
    parameters = sum(4 * math.prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert memory[UNET].weights == pytest.approx(parameters, rel=0.1)


def test_engines_hold_the_inputs_of_the_bucket(built):
    path, specs, _ = built
    grounded = next(s for s in specs if s.graph == UNET_GROUNDED)
    assert grounded.shapes["latents"] == [2, 4, 16, 16], "both halves of guidance see them"
    assert grounded.shapes["context.0"] == [4, 77, 64]
    assert next(s for s in specs if s.graph == CONTEXT).shapes == {"context": [4, 77, 32]}
    assert grounded.shapes["query_valid"] == [2, 3]
    assert open_bundle(path).manifest.precision == grounded.precision


def test_what_is_there_is_not_built_again(built, monkeypatch):
    path, specs, _ = built
    monkeypatch.setattr(engines, "build_plan", lambda *_: pytest.fail("built again"))
    assert build_engines(open_bundle(path), RTX, sms=[86], buckets=[Bucket(2, objects=3)]) == specs


def test_a_changed_byte_is_refused_and_rebuilt(text_engine):
    path, spec, directory = text_engine
    plan = bytearray((directory / PLAN).read_bytes())
    plan[len(plan) // 2] ^= 1
    (directory / PLAN).write_bytes(plan)
    with pytest.raises(
        BackendError, match=r"engine.plan has changed since it was built.*--bundle .* --engine tensorrt-rtx"
    ):
        load_plan(path, spec)
    build_engines(open_bundle(path), RTX, sms=[86], buckets=[Bucket(2, objects=3)], graphs=[TEXT_ENCODER])
    assert load_plan(path, spec)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "9.9"}, "version is 1.*, not 9.9"),
        ({"device": "sm_89"}, "device is sm_86, not sm_89"),
        ({"shapes": {"input_ids": [8, 77]}}, "built for input_ids 2x77, not input_ids 8x77"),
        ({"precision": "fp16"}, "precision is fp32, not fp16"),
        ({"flags": {"tf32": True}}, "flags is"),
        ({"files": {TEXT_ENCODER: "0"}}, "built from another .*text_encoder.onnx"),
    ],
)
def test_stale_and_foreign_engines_are_named(text_engine, change, says):
    path, spec, directory = text_engine
    wanted = dataclasses.replace(spec, **change)
    with pytest.raises(BackendError, match=f"has no engine of .*nearest is stale or foreign: {says}.*gd-export --b"):
        load_plan(path, wanted)
    directory.rename(wanted.directory(path))  # a copy put under the key asked for does not pass either
    with pytest.raises(BackendError, match=f"holds another engine: {says}"):
        load_plan(path, wanted)


def test_a_changed_model_looks_for_another_engine(text_engine):
    path, spec, _ = text_engine
    bundle = open_bundle(path)
    files = bundle.manifest.files | {TEXT_ENCODER: "1" * 64}
    changed = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))
    wanted = engine_spec(changed, TEXT_ENCODER, RTX, 86, Bucket(2, objects=3))
    assert wanted.key != spec.key
    with pytest.raises(BackendError, match=r"built from another text_encoder.onnx"):
        load_plan(path, wanted)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / SIDECAR).unlink(), "has no engine.json, so its build did not finish"),
        (lambda d: (d / PLAN).unlink(), "engine.plan is missing"),
        (lambda d: (d / SIDECAR).write_text("{"), "engine.json is damaged"),
        (lambda d: (d / SIDECAR).write_text("[]"), "engine.json is damaged"),
        (lambda d: (d / SIDECAR).write_bytes(b"\xff\xfe"), "engine.json is damaged"),
        (lambda d: (d / SIDECAR).write_text(json.dumps({"schema": 99})), "has schema 99, this version reads 1"),
    ],
)
def test_damaged_engines_are_refused(text_engine, damage, says):
    path, spec, directory = text_engine
    damage(directory)
    with pytest.raises(BackendError, match=says):
        load_plan(path, spec)


def test_an_interrupted_build_leaves_nothing(text_engine):
    path, _, _ = text_engine

    def stop(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    before = sorted((path / "engines" / RTX).iterdir())
    with pytest.raises(KeyboardInterrupt):
        build_engines(open_bundle(path), RTX, sms=[89], buckets=[Bucket(1)], graphs=[TEXT_ENCODER], progress=stop)
    assert sorted((path / "engines" / RTX).iterdir()) == before


def test_a_graph_that_does_not_parse_is_named(text_engine):
    path, spec, _ = text_engine
    model = path / TEXT_ENCODER
    model.write_bytes(model.read_bytes().replace(b"MatMul", b"MatMux"))
    with pytest.raises(BackendError, match=r"cannot parse text_encoder.onnx: .*MatMux"):
        engines.build_plan(open_bundle(path, verify=False), spec)


def test_equal_bytes_of_two_types_have_two_places(tmp_path):
    store = WeightStore(tmp_path)
    zeros = bytes(4096)
    places = [store.place(zeros, kind)[:2] for kind in ("FLOAT", "FLOAT16", "FLOAT")]
    assert places[0] == places[2] != places[1]  # TensorRT names weights by their address, and wants one length of each


def test_devices_and_backends_that_are_not_there(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(BackendError, match=r"builds for --sm .*86, 89, 120.*, not 90"):
        engine_spec(bundle, UNET, RTX, 90, Bucket(1))
    with pytest.raises(BackendError, match="there is no backend openvino"):
        engine_spec(bundle, UNET, "openvino", 86, Bucket(1))


def test_a_backend_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'grounded-diffusion\[tensorrt\]'"):
        load_module("tensorrt")


def test_sizes_the_model_cannot_take(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    multiple = bundle.manifest.size_multiple
    shapes = profile_shapes(bundle, UNET, Bucket(3, image_size=(multiple, 2 * multiple)))
    cells = multiple // bundle.manifest.vae_scale_factor
    assert shapes["latents"] == [3, bundle.manifest.latent_channels, cells, 2 * cells]
    assert shapes["context.0"][0] == 6
    with pytest.raises(UsageError, match="is not a multiple of"):
        profile_shapes(bundle, UNET, Bucket(1, image_size=(multiple + 1, multiple)))
    with pytest.raises(UsageError, match="must be at least 1"):
        Bucket(0)


def test_command_line(text_engine, capsys):
    path, _, directory = text_engine
    (directory / SIDECAR).write_text("{")
    command = ["--bundle", str(path), "--engine", "tensorrt-rtx", "--sm", "86", "--batch", "2,4", "--objects", "3"]
    assert cli.main([*command, "--graph", TEXT_ENCODER]) == 0
    said = [line.split("] ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in said] == ["refused:", "building", "built", "building", "built"]
    assert said[3].startswith("building text_encoder.onnx for tensorrt_rtx")
    assert "input_ids 4x77" in said[3]
    assert cli.main([*command, "--graph", TEXT_ENCODER]) == 0
    assert all("already there" in line for line in capsys.readouterr().out.splitlines())
    assert cli.main([*command[:4], "--sm", "90"]) == 1
    assert capsys.readouterr().err.startswith("gd-export: tensorrt_rtx")
    assert len(list(path.glob("engines/*/*"))) == 2


def test_the_unet_without_guidance_has_half_the_rows(text_engine, capsys):
    path, _, _ = text_engine
    command = ["--bundle", str(path), "--engine", "tensorrt-rtx", "--sm", "86", "--graph", UNET]
    assert cli.main([*command, "--guided-only"]) == 0
    assert cli.main(command) == 0
    built = [line for line in capsys.readouterr().out.splitlines() if "building" in line]
    assert len(built) == 2
    assert "context.0 2x77" in built[0]
    assert "context.0 1x77" in built[1]


def test_the_runtime_takes_only_engines_of_its_gpu_version_and_sizes(built, tmp_path):
    path, specs, _ = built
    open_for = lambda arch, at=path: TensorRT(open_bundle(at), RTX, SimpleNamespace(name="GPU", arch=arch))
    assert open_for(86).buckets(2, 3, (64, 64)) == [(2, 3)] == open_for(86).buckets(7, 2, (64, 64))
    with pytest.raises(BackendError, match=r"device is sm_86, not sm_89.*gd-export --bundle .* --sm 89 --batch 2$"):
        open_for(89).buckets(2, 3, (64, 64))
    with pytest.raises(BackendError, match=r"built for latents 2x4x16x16.*--batch 4 --objects 9$"):
        open_for(86).buckets(4, 9, (64, 64))
    with pytest.raises(BackendError, match=r"has no engine of .*--batch 2 --size 96x64$"):
        open_for(86).buckets(2, 3, (96, 64))
    spec = next(s for s in specs if s.graph == TEXT_ENCODER)
    shutil.copytree(path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    directory = shutil.copytree(spec.directory(path), spec.directory(tmp_path / "bundle"))
    plan = (directory / PLAN).read_bytes()[:5000]  # no engine, though its hash is in order
    (directory / PLAN).write_bytes(plan)
    record = json.loads((directory / SIDECAR).read_text())
    (directory / SIDECAR).write_text(json.dumps(record | {"plan_sha256": hashlib.sha256(plan).hexdigest()}))
    with pytest.raises(BackendError, match=r"^tensorrt-rtx cannot load text_encoder.onnx for tensorrt_rtx .*: \S"):
        open_for(86, tmp_path / "bundle").engine(spec)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "tensorrt-rtx"], "needs --sm"),
        (["--engine", "tensorrt-rtx", "--sm", "86", "--batch", "0"], "positive whole numbers"),
        (["--engine", "tensorrt-rtx", "--sm", "eight"], "positive whole numbers"),
        (["--engine", "tensorrt-rtx", "--sm", "86", "--size", "512x"], "'512x' is not a size"),
        ([], "--bundle needs --engine"),
        (["--ckpt", "model"], "not allowed with argument"),
    ],
)
def test_command_line_mistakes_are_named(arguments, says, capsys):
    assert cli.main(["--bundle", "bundle", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("512x768", (512, 768))])
def test_sizes_as_gd_infer_takes_them(text, size):
    parser = argparse.ArgumentParser()
    engine_cli.add_options(parser)
    assert parser.parse_args(["--size", text]).size == size


def test_an_export_with_a_backend_that_is_missing_stops_before_it_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert cli.main(["--ckpt", str(tmp_path), "--out", str(tmp_path / "out"), "--engine", "tensorrt"]) == 1
    assert "pip install 'grounded-diffusion[tensorrt]'" in capsys.readouterr().err
    assert cli.main(["--ckpt", str(tmp_path), "--out", str(tmp_path / "out"), "--sm", "86"]) == 2
    assert "--sm needs --engine" in capsys.readouterr().err
