"""gd-bench on a tiny model: fields, order of turns, tables, what is left out, and what a wrong peer costs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from grounded_diffusion.bench import cli, speed, systems, timing, work
from grounded_diffusion.bench.flops import count_flops
from grounded_diffusion.bench.report import bar_chart
from grounded_diffusion.bench.timing import Timing, alternate
from grounded_diffusion.bench.work import EngineForm
from grounded_diffusion.bundle import UNET, UNET_GROUNDED
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.errors import ParityError
from grounded_diffusion.export.shapes import axis_sizes

UNETS = (UNET_GROUNDED, UNET)
EXACT = ["--backend", "onnxruntime"]
TINY = ["--threads", "1", "--batch", "2", "--lanes", "1"]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)


@pytest.fixture(scope="module")
def model(tiny_bundle, tiny_checkpoint):
    return ["--model", str(tiny_bundle), "--ckpt", str(tiny_checkpoint), *TINY]


def bench(*options) -> int:
    return cli.main([str(option) for option in options])


def test_systems_take_turns():
    ran = []
    runs = {name: lambda number, name=name: ran.append((name, number)) for name in "ABC"}
    timings, order = alternate(runs, lambda first: 3)
    assert order == [*"ABCABCABC"] and ran == [(name, i // 3) for i, name in enumerate(order)]
    assert all(len(timing.seconds) == 3 and min(timing.seconds) >= 0 for timing in timings.values())


def test_median_and_quartiles():
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0))
    assert (timing.median, timing.quartiles, timing.spread) == (3.0, (2.0, 4.0), 2 / 3)
    assert Timing((2.0,)).quartiles == (2.0, 2.0)


def test_speed(model, tiny_bundle, tmp_path, capsys):
    options = ["--peers", "eager fp32", "--steps", 2, "--images", 2, "--rounds", 2, "--repeats", 2, *EXACT]
    options += ["--peer-batch", 2, "--no-memory", "--out", tmp_path]
    assert bench("speed", *model, *options) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    names = ["engine fp32", "engine fp32, folder writer", "eager fp32"]
    assert result["order"] == names * 2 and [row["name"] for row in result["systems"]] == names
    assert not result["omitted"] and result["prepare_s"].keys() == {"eager fp32"}
    for row in result["systems"]:
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"]) and len(row["seconds"]) == 2
        assert row["q1_s"] <= row["median_s"] <= row["q3_s"]
    assert all(found["psnr"] > 45 and found["mask_iou"] > 0.99 for found in result["agreement"].values())
    assert 0.05 < result["unet_share"] < 1
    stages = {row["name"]: row for row in result["stages"]}
    assert len(stages) == 10 and stages["UNet, grounded"]["flops"] > stages["UNet, plain"]["flops"] > 0
    head = stages["UNet, grounded"]["flops"] - stages["UNet, plain"]["flops"]
    assert stages["head (grounded - plain)"]["flops"] == head
    plain, folded = (stages[f"head in torch, {form}"]["flops"] for form in ("plain", "folded"))
    assert head < folded < plain, "the head's convolutions are Winograd's in the CPU's graph"
    grounded, alone = (sum(count_flops(tiny_bundle / g, axis_sizes(2, work.OBJECTS, 16, 16)).values()) for g in UNETS)
    assert folded == pytest.approx(grounded - alone, rel=0.01)
    about = result["environment"]
    assert about["cpu"] and about["cores"] >= 1 and about["versions"]["onnxruntime"] and len(about["bundle"]) == 64
    assert all(f"| {name} |" in said for name in [*names, *stages]) and (tmp_path / "speed-cpu.md").read_text() == said
    texts = [element.text for element in ElementTree.parse(tmp_path / "speed-cpu.svg").iter() if element.text]
    assert set(names) <= set(texts)


def test_two_backends_in_one_precision_are_two_rows(model, tmp_path, capsys):
    options = ["--peers", "eager fp32", "--steps", 2, "--images", 2, "--rounds", 1, "--repeats", 1, "--peer-batch", 2]
    both = ["--backend", "openvino", *EXACT]
    assert bench("speed", *model, *options, *both, "--out", tmp_path) == 0
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    rows = {row["name"]: row for row in result["systems"]}
    first = "engine fp32 by openvino"
    assert list(rows) == [first, f"{first}, folder writer", "engine fp32", "eager fp32"]
    assert {row["precision"] for row in rows.values()} == {"fp32"}
    assert [form["backend"] for form in result["setting"]["engines"].values()] == ["openvino", "onnxruntime"]
    assert result["agreement"][first]["psnr"] > 45
    assert all(row["peak_memory"] for row in rows.values())
    best = max(rows[first]["images_per_s"], rows["engine fp32"]["images_per_s"])
    assert f"| {best / rows['eager fp32']['images_per_s']:.2f}× |" in capsys.readouterr().out


def test_a_bundle_with_the_attention_head(attention_bundle, tiny_checkpoint, tmp_path, capsys):
    """The peer has the very head that the bundle says, whatever lies beside the model."""
    options = ["--model", attention_bundle[1], "--ckpt", tiny_checkpoint, *TINY, "--peers", "eager fp32", *EXACT]
    options += ["--steps", 2, "--images", 2, "--rounds", 1, "--repeats", 1, "--peer-batch", 2, "--no-memory"]
    assert bench("speed", *options, "--out", tmp_path) == 0
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    found = result["agreement"]["eager fp32"]
    assert found["psnr"] > 45
    assert found["mask_iou"] > 0.99
    stages = {row["name"]: row for row in result["stages"]}
    assert stages["UNet, grounded"]["flops"] > stages["UNet, plain"]["flops"] > 0
    assert stages["head in torch, folded"]["flops"] > 0


@pytest.mark.slow
def test_compiled_and_exported_peers_make_the_engines_images(model, tmp_path):
    options = ["--steps", 3, "--images", 2, "--rounds", 1, "--repeats", 1, "--no-memory", *EXACT]
    peers = ["compile fp32", "onnxruntime fp32", "openvino fp32"]
    options += ["--peers", ",".join(peers), "--peer-batch", 2, "--out", tmp_path]
    assert bench("speed", *model, *options) == 0
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert result["agreement"].keys() == set(peers) == result["prepare_s"].keys()
    assert all(found["psnr"] > 45 and found["mask_iou"] > 0.99 for found in result["agreement"].values())


def test_peak_memory_is_that_of_a_process_with_one_system(tiny_bundle, tiny_checkpoint, tmp_path):
    pipe = GroundedPipeline.open(tiny_bundle, threads=1)
    plan = speed.Plan(
        options=Options(steps=1, batch=1, guidance_interval=work.EVERY_STEP), threads=1, peers=("eager fp32",),
        engines={"fp32": EngineForm("onnxruntime", 1, 1)}, peer_forms={"fp32": work.PeerForm(1)}, images=1, least=1,
        rounds=1, repeats=1, checkpoint=tiny_checkpoint, folder=tmp_path,
    )  # fmt: skip
    assert speed.Plan.load(json.loads(json.dumps(plan.dump()))) == plan
    said = []
    peaks = speed.peak_memory(pipe, plan, ["engine fp32", "eager fp32", "nothing"], said.append)
    assert "nothing" in said[-1] and "eager fp32 was not" not in " ".join(said)
    assert 30e6 < peaks["engine fp32"] < peaks["eager fp32"] < 8e9  # no torch in the first
    assert peaks["nothing"] is None and "the memory of nothing was not measured" in said[-1]


def test_what_is_not_installed_is_left_out_aloud(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(systems, "NEEDED", ("torch", "no_such_package"))
    options = ["--peers", "eager fp32", "--steps", 2, "--images", 2, "--rounds", 1, "--repeats", 1, "--no-memory"]
    options += EXACT
    assert bench("speed", *model, *options, "--out", tmp_path) == 0
    said = capsys.readouterr()
    assert "LEFT OUT: eager fp32 (not installed: no_such_package)" in said.err
    assert "eager fp32: left out, not installed: no_such_package." in said.out
    result = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert result["omitted"] == {"eager fp32": "not installed: no_such_package"} and len(result["systems"]) == 2


def test_without_a_gpu_the_gpu_bench_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    assert bench("speed", "--backend", "cuda") == 0
    assert capsys.readouterr().out == "skipped: no NVIDIA GPU\n"


def test_a_peer_that_makes_other_images_stops_the_bench():
    image, mask = np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 1, 4, 4), bool)
    same = speed.agreement("peer fp32", work.Output(image, mask), work.Output(image, mask))
    assert same == {"psnr": 99.0, "psnr_mean": 99.0, "mask_iou": 1.0, "mask_iou_pooled": 1.0}
    with pytest.raises(ParityError, match="peer fp32 makes other images than the engine"):
        speed.agreement("peer fp32", work.Output(image + 40, mask), work.Output(image, mask))


def save_judge(folder, names):
    """A segmenter with random weights, as transformers saves it."""
    import torch

    from grounded_diffusion.training.detectors.network import open_network

    torch.manual_seed(0)
    for part in open_network(None, names, 32):
        part.save_pretrained(folder)
    return folder


def test_quality(model, tmp_path, capsys):
    judge = save_judge(tmp_path / "judge", ["dog", "cat", "unicorn"])
    (tmp_path / "settings.json").write_text('[{"name": "short", "sampler": "dpmpp-2m", "steps": 2, "capture": 501}]')
    options = [
        "--setting",
        "system=eager sampler=ddim steps=3",
        "--setting",
        "sampler=ddim steps=3 guidance_interval=[0,1] name=same",
    ]
    options += ["--setting", "steps=3 guidance_interval=[0,0.5]", "--settings", tmp_path / "settings.json"]
    given = ["--judge", judge, "--images", 5, "--out", tmp_path]
    assert bench("quality", *model, *given, *options) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "quality.json").read_text())["settings"]
    assert [row["name"] for row in rows] == ["sampler=ddim steps=3", "same", "steps=3 guidance_interval=0-0.5", "short"]
    assert all(row["images"] == 5 and 0 <= row["found"] <= 1 and row["images_per_s"] > 0 for row in rows)
    eager, same, interval, short = rows
    assert eager["mask_iou_to_first"] == 1 and same["mask_iou_to_first"] > 0.99 and same["psnr_to_first"] > 45
    assert same["found"] == eager["found"] and short["mask_iou_to_first"] < 0.99 and interval["psnr_to_first"] < 45
    assert interval["options"]["guidance_interval"] == [0.0, 0.5] and short["capture"] == 501
    assert "| sampler=ddim steps=3 (eager) |" in said and "5 images each." in said


def test_a_judge_of_other_names_is_refused(model, tmp_path, capsys):
    judge = save_judge(tmp_path / "judge", ["zeppelin"])
    assert bench("quality", *model, "--judge", judge, "--setting", "steps=2", "--images", 4) == 2
    assert "the judge knows none of the model's names; its labels are background, zeppelin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler", "'sampler' is not of the form key=value"),
        ("speed=9", "unknown key speed in a setting; known: capture, model, name, precision, system, steps"),
        ("system=other", "there is no system 'other'"),
        ("model=other", "there is no model 'other'"),
        ("model=student", "no engine in fp32 of the student here"),
        ("system=eager guidance_interval=[0,0.5]", "guidance at every step"),
        ("steps=0", "steps must be"),
    ],
)
def test_settings_that_cannot_be_run(model, tmp_path, capsys, setting, message):
    judge = save_judge(tmp_path / "judge", ["dog"])
    assert bench("quality", *model, "--judge", judge, "--setting", setting) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_counts_are_at_least_1(capsys):
    assert bench("grounding", "--threads", 0) == 2
    assert "--threads must be a whole number from 1 to 1024, not 0" in capsys.readouterr().err


def test_grounding(tmp_path, capsys):
    assert bench("grounding", "--size", "tiny", "--rounds", 1, "--threads", 1, "--out", tmp_path) == 0
    result = json.loads((tmp_path / "grounding-tiny.json").read_text())
    calls = result["calls"]
    assert calls["UNet, grounded"]["flops"] == calls["UNet, plain"]["flops"] + calls["head, folded"]["flops"]
    for steps, part in result["share_of_generation"].items():
        head, unet = calls["head, folded"]["flops"], calls["UNet, plain"]["flops"]
        assert part["flops"] == pytest.approx(head / (int(steps) * unet + head)) and 0 < part["head_time"] < 1
    assert "| grounding's share of a guided generation | 20 steps | 50 steps |" in capsys.readouterr().out
    assert bench("grounding", "--size", "sd99") == 2


def test_bars_are_as_long_as_their_values():
    chart = ElementTree.fromstring(bar_chart([("a & b", 2.0, "2"), ("c", 1.0, "1")], "<title>", ("c",)))
    widths = [float(bar.get("width")) for bar in chart.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert widths[0] == 2 * widths[1] > 0
