"""The exported bundle: parity of graphs and loop, shared weights, honest manifest, and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from transformers import CLIPTokenizer

from grounded_diffusion.bundle import (
    CONTEXT,
    CPU,
    GRAPH_IO,
    GRAPHS,
    MAKERS,
    MANIFEST,
    OPENVINO,
    SHARED_ROWS,
    TEXT_ENCODER,
    UNET,
    UNET_GROUNDED,
    VAE_DECODER,
    open_bundle,
    sha256,
)
from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.errors import BundleError, ParityError, UsageError
from grounded_diffusion.export import cli
from grounded_diffusion.export.cpu import cut, for_cpu
from grounded_diffusion.export.graphs import MODULES, RowwiseGroupNorm, Sizes, example_inputs, rowwise, swapped
from grounded_diffusion.export.reference import generate
from grounded_diffusion.export.staging import check_output, staged
from grounded_diffusion.export.verify import check_graphs, check_loop, mask_iou, psnr, relative_l2, table, verify_bundle
from grounded_diffusion.export.weights import WeightStore
from grounded_diffusion.training.checkpoint import load_checkpoint
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint)


def test_graphs_equal_their_torch_modules(checkpoint, tiny_bundle):
    rows = check_graphs(checkpoint, tiny_bundle)
    assert len(rows) == 16 and all(row.tolerance == 1e-5 for row in rows)
    assert all(row.passed for row in rows), "\n".join(table(rows))


def test_the_loop_equals_the_diffusers_pipeline(checkpoint, tiny_bundle):
    rows = check_loop(checkpoint, tiny_bundle)
    assert [row.tolerance for row in rows] == [50.0, 0.999]
    assert all(row.passed for row in rows), "\n".join(table(rows))


def test_the_reference_gives_the_same_image_alone_and_in_a_batch(checkpoint):
    """And it has masks to compare: neither empty nor full."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    prompts, names = ["a photograph of a dog", "a photograph of a cat and a dog"], ["dog", "cat", "unicorn"]
    both = generate(checkpoint, prompts, names, noise, 4, 5.0, 1.0)
    alone = generate(checkpoint, prompts[1:], names, noise[1:], 4, 5.0, 1.0)
    assert psnr(both.images[1].numpy(), alone.images[0].numpy()) >= 50
    assert all(mask_iou(a.numpy(), b.numpy()) >= 0.999 for a, b in zip(both.masks[1], alone.masks[0], strict=True))
    assert 0.02 < both.masks.float().mean() < 0.98


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_take_the_promised_names_and_any_shape(checkpoint, tiny_bundle, graph):
    session = onnxruntime.InferenceSession(str(tiny_bundle / graph), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(GRAPH_IO[graph][0])
    assert [value.name for value in session.get_outputs()] == list(GRAPH_IO[graph][1])
    for value in session.get_inputs():
        symbols = GRAPH_IO[graph][0][value.name].split(",")
        assert [axis if isinstance(axis, str) else None for axis in value.shape] == [
            symbol if symbol in ("B", "N", "O", "h", "w") else None for symbol in symbols
        ]
    inputs = example_inputs(checkpoint, graph, Sizes(batch=5, objects=8, height=20, width=12), seed=9)
    actual = session.run(None, {name: value.numpy() for name, value in inputs.items()})[-1]
    with torch.no_grad():
        expected = MODULES[graph](checkpoint)(**inputs)
    expected = (expected[-1] if isinstance(expected, tuple) else expected).numpy()
    assert relative_l2(actual, expected) <= 1e-5


def external(path) -> dict[str, tuple]:
    model = onnx.load(path, load_external_data=False)
    return {
        tensor.name: tuple((entry.key, entry.value) for entry in tensor.external_data)
        for tensor in model.graph.initializer
        if tensor.external_data
    }


def test_both_unets_read_the_same_weights(tiny_bundle):
    plain, grounded = external(tiny_bundle / UNET), external(tiny_bundle / UNET_GROUNDED)
    assert len(plain) > 100 and plain.items() < grounded.items()
    assert sum((tiny_bundle / graph).stat().st_size for graph in GRAPHS) < 1_000_000


def test_graphs_are_tidy(tiny_bundle):
    """Nothing of the machine that made them, and no casts that do nothing."""
    for graph in GRAPHS:
        content = (tiny_bundle / graph).read_bytes()
        assert b".py" not in content and b"site-packages" not in content and b"stack_trace" not in content
        model = onnx.load(tiny_bundle / graph, load_external_data=False)
        assert model.opset_import[0].version == 20 and not model.functions
        assert not [node.name for node in model.graph.node if node.op_type in ("CastLike", "Identity")]


def test_graphs_for_the_cpu(tiny_bundle):
    """Attention, GEGLU, group norm and upsampling are rewritten; the weights are those of the standard graph."""
    bundle = open_bundle(tiny_bundle)
    assert bundle.variant(CPU, TEXT_ENCODER) == bundle.file(TEXT_ENCODER)
    for graph in (UNET, UNET_GROUNDED, VAE_DECODER):
        assert bundle.variant(CPU, graph) == tiny_bundle / CPU / graph
    count = lambda model: Counter(node.op_type for node in model.graph)
    before, model = count(onnx_ir.load(bundle.file(UNET))), for_cpu(onnx_ir.load(bundle.file(UNET)))
    shared, after = count(cut(model, "context")), count(model)
    assert after["MultiHeadAttention"] == before["Softmax"] > 0 == after["Softmax"]
    assert after["BatchNormalization"] == after["InstanceNormalization"] == before["InstanceNormalization"] > 0
    assert after["ConvTranspose"] == before["Resize"] > 0 == after["Resize"]
    assert shared == {"MatMul": before["Softmax"]}  # half of them are to the context: a key and a value each
    assert shared == count(onnx_ir.load(bundle.variant(CPU, CONTEXT)))
    added = before["Gelu"] + 2 * before["Resize"]
    assert after["MatMul"] == before["MatMul"] - 2 * before["Softmax"] + added - shared["MatMul"]
    assert count(onnx_ir.load(bundle.variant(CPU, UNET)))["EyeLike"] > 0 == after["EyeLike"]  # winograd's
    standard, own = external(tiny_bundle / UNET), external(tiny_bundle / CPU / UNET)
    assert {tensor for name, tensor in own.items()} <= {tensor for name, tensor in standard.items()}


def test_graphs_for_openvino(tiny_bundle):
    """Standard operators alone; what depends on the context or the timestep alone is made elsewhere."""
    bundle = open_bundle(tiny_bundle)
    assert bundle.variant(OPENVINO, TEXT_ENCODER) == bundle.file(TEXT_ENCODER)
    for graph in (UNET, UNET_GROUNDED, VAE_DECODER, *MAKERS.values()):
        model = onnx_ir.load(bundle.variant(OPENVINO, graph))
        assert {node.domain for node in model.graph} == {""}, graph
    standard, own = (onnx_ir.load(path) for path in (bundle.file(UNET), bundle.variant(OPENVINO, UNET)))
    before, after = (Counter(node.op_type for node in model.graph) for model in (standard, own))
    assert after["Softmax"] == before["Softmax"] > 0
    assert after["ConvTranspose"] == before["Resize"] > 0 == after["Resize"]
    assert after["Sin"] == 0 < before["Sin"]
    assert after["InstanceNormalization"] == 0 < before["InstanceNormalization"]
    made = {}
    for source, graph in MAKERS.items():
        maker = onnx_ir.load(bundle.variant(OPENVINO, graph))
        assert [value.name for value in maker.graph.inputs] == [source]
        made |= {value.name: value.shape for value in maker.graph.outputs}
    inputs = {value.name: value for value in own.graph.inputs}
    assert inputs.keys() == {"latents"} | made.keys()
    assert str(inputs["latents"].shape[0]) == SHARED_ROWS
    assert {inputs[name].shape[0] for name in made if name.startswith("timestep.")} == {1}


@pytest.mark.parametrize("graph", [UNET, UNET_GROUNDED])
def test_halves_of_guidance_share_what_they_have_in_common(checkpoint, tiny_bundle, graph):
    """With latents given once the CPU's graphs are as with both halves; half the rows go through the first layers."""
    bundle = open_bundle(tiny_bundle)
    standard = replace(bundle, manifest=replace(bundle.manifest, files=dict.fromkeys(GRAPHS, "")))
    inputs = {k: v.numpy() for k, v in example_inputs(checkpoint, graph, Sizes(3, 4, 8, 24), seed=2).items()}
    once = inputs | {name: inputs[name][:3] for name in ("latents", "timestep")}
    both = inputs | {name: np.concatenate([inputs[name][:3]] * 2) for name in ("latents", "timestep")}
    expected = {k: v.copy() for k, v in OnnxRuntimeBackend(standard).run(graph, both).items()}
    for backend in (OnnxRuntimeBackend(bundle), OnnxRuntimeBackend(standard)):
        for given in (once, both, once):
            outputs = backend.run(graph, given)
            assert outputs.keys() == expected.keys()
            assert all(relative_l2(outputs[name], expected[name]) < 1e-5 for name in expected)
    model = onnx.load(tiny_bundle / CPU / graph, load_external_data=False)
    tiles = {node.input[0] for node in model.graph.node if node.op_type == "Tile"}
    convolved = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    assert tiles & convolved and "latents" in tiles


def test_equal_tensors_are_stored_once(tmp_path):
    store = WeightStore(tmp_path)
    first, again, other = store.place(b"a" * 5000), store.place(b"a" * 5000), store.place(b"b" * 7)
    assert first == again == ("weights.0.bin", 0, 5000) and other == ("weights.0.bin", 8192, 7)
    content = (tmp_path / "weights.0.bin").read_bytes()
    assert content[:5000] == b"a" * 5000 and content[8192:] == b"b" * 7


def test_the_manifest_describes_the_model(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.image_size == (64, 64) and manifest.vae_scale_factor == 4 and manifest.size_multiple == 16
    assert (manifest.context_length, manifest.context_dim, manifest.latent_channels) == (77, 32, 4)
    assert manifest.scheduler["_class_name"] == "DDIMScheduler"
    assert manifest.scheduler["prediction_type"] == "v_prediction"
    assert manifest.head["variant"] == "released" and manifest.head["statistics"] == "per_image"
    assert manifest.names == dict(seen=["dog", "cat"], unseen=["unicorn"])
    on_disk = {str(path.relative_to(tiny_bundle)) for path in tiny_bundle.rglob("*") if path.is_file()} - {MANIFEST}
    assert on_disk == set(manifest.files)


def test_the_tokenizer_is_clip_s(tiny_checkpoint, tiny_bundle):
    from tokenizers import Tokenizer

    clip = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    ours = Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    for text in (
        "a photograph of a dog",
        "A  Photo\tof naïve café — “Ünïcode” 犬 🐕!",
        "",
        "don't 123 dogs",
        "x" * 300,
    ):
        assert ours.encode(text).ids == clip(text).input_ids


def test_sizes_that_do_not_divide_are_refused(tiny_bundle):
    with pytest.raises(UsageError, match="16"):
        GroundedPipeline.open(tiny_bundle).generate("a photograph of a [dog]", size=72)


def remove_manifest(bundle):
    (bundle / MANIFEST).unlink()


def change_a_byte(bundle):
    with (bundle / "weights.0.bin").open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))


def raise_the_schema(bundle):
    raw = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(raw | {"schema": raw["schema"] + 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_manifest, "did not finish; run gd-export again"),
        (change_a_byte, r"weights\.0\.bin has changed since export"),
        (raise_the_schema, "upgrade grounded-diffusion"),
    ],
)
def test_damaged_bundles_are_refused(tiny_bundle, tmp_path, damage, message):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    damage(bundle)
    with pytest.raises(BundleError, match=message) as error:
        open_bundle(bundle)
    assert "\n" not in str(error.value)


def test_a_bundle_of_another_checkpoint_fails_verification(checkpoint, tiny_bundle):
    head = GroundingHead(checkpoint.head.config)
    lines = []
    with pytest.raises(ParityError, match="mask_logits: relative L2"):
        verify_bundle(replace(checkpoint, head=head.eval()), tiny_bundle, lines.append)
    assert sum("FAILED" in line for line in lines) >= 1
    assert any("unet.onnx" in line and "FAILED" not in line for line in lines)


def test_a_failed_export_leaves_what_was_there(tiny_bundle, tmp_path):
    out = shutil.copytree(tiny_bundle, tmp_path / "out")
    before = sha256(out / MANIFEST)
    with pytest.raises(ParityError), staged(out) as work:
        (work / "half").write_text("half")
        raise ParityError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and sha256(out / MANIFEST) == before
    with staged(out) as work:
        (work / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == ["new"]


def test_where_a_bundle_may_not_go(tiny_bundle, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="not empty; give another --out, or --overwrite"):
        check_output(tiny_bundle, overwrite=False)
    with pytest.raises(UsageError, match="holds no bundle, so it is not replaced"):
        check_output(tmp_path / "mine", overwrite=True)
    with pytest.raises(UsageError, match="cannot write to"):
        check_output(tmp_path / "file" / "below", overwrite=False)
    check_output(tiny_bundle, overwrite=True)
    check_output(tmp_path / "new" / "deep", overwrite=False)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--ckpt", "nowhere", "--out", "out"], 2, "there is no checkpoint at nowhere"),
        (["--ckpt", "junk.pth", "--out", "out"], 2, "name its Stable Diffusion 1.x model with --base"),
        (["--ckpt", "empty", "--out", "out"], 2, "is not a checkpoint"),
        (["--ckpt", "empty", "--out", "full"], 2, "is not empty"),
        (["--ckpt", "empty", "--out", "junk.pth/out"], 2, "cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, options, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(options) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gd-export: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_without_a_tokenizer_is_refused(tiny_checkpoint, tmp_path, capsys):
    """The tokenizer that is left has two tokens, and graphs and loop would agree on it."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert cli.main(["--ckpt", str(copy), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "knows 2 tokens" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [("manifest.json", "{}"), ("manifest.json", "[]"), ("run.json", "[]")])
def test_a_file_of_a_familiar_name_makes_no_bundle(tmp_path, capsys, name, content):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text(content)
    (mine / "thesis.tex").write_text("years")
    assert cli.main(["--ckpt", str(tmp_path), "--out", str(mine), "--overwrite"]) == 2
    assert "holds no bundle, so it is not replaced" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text() == "years" and (mine / name).read_text() == content


def test_what_lies_beside_a_bundle_is_named_and_stays(tiny_bundle, tmp_path, capsys):
    out = shutil.copytree(tiny_bundle, tmp_path / "out")
    (out / "thesis.tex").write_text("years")
    before = sorted(out.rglob("*"))
    assert cli.main(["--ckpt", str(tmp_path), "--out", str(out), "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "thesis.tex" in said and "nothing is removed" in said and said.count("\n") == 1
    assert sorted(out.rglob("*")) == before
    for wrong in ("", "s3://bucket/bundle"):
        assert cli.main(["--ckpt", str(tmp_path), "--out", wrong, "--overwrite"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_gd_export_of_a_released_head(small_checkpoint, tmp_path, capsys):
    """The whole command: a .pth on a base model, stored statistics, paper's sizes of attention, verified."""
    head = GroundingHead(HeadConfig.for_unet(load_checkpoint(small_checkpoint).unet.config))
    torch.save(head.state_dict(), tmp_path / "grounding_module.pth")
    out = tmp_path / "bundle"
    options = ["--ckpt", tmp_path / "grounding_module.pth", "--base", small_checkpoint, "--out", out]
    assert cli.main([*map(str, options), "--statistics", "stored"]) == 0
    said = capsys.readouterr().out
    assert "mask IoU" in said and "image PSNR" in said and "FAILED" not in said
    manifest = open_bundle(out).manifest
    assert manifest.head["statistics"] == "stored" and manifest.head["embed_dim"] == 512 and manifest.names == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "grounding_module.pth"]


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (2, 8, 11)])
def test_rowwise_norms_equal_group_norms_and_share_their_weights(shape):
    module = torch.nn.Sequential(torch.nn.GroupNorm(4, 8))
    torch.nn.init.normal_(module[0].weight)
    torch.nn.init.normal_(module[0].bias)
    twin, x = swapped(module, rowwise), torch.randn(shape) * 3 + 5
    assert isinstance(twin[0], RowwiseGroupNorm) and isinstance(module[0], torch.nn.GroupNorm)
    assert twin[0].weight is module[0].weight
    torch.testing.assert_close(twin(x), module(x))


NOISE = """
import warnings
warnings.simplefilter("default")
from grounded_diffusion.export.cli import quiet_libraries
quiet_libraries()
from diffusers.utils import deprecate
from transformers.utils import logging
deprecate("a thing", "99.0.0", "use another", standard_warn=False)
warnings.warn("soon gone", FutureWarning)
logging.get_logger("transformers").warning("advice")
warnings.warn("ours")
"""


def test_gd_export_speaks_of_its_own_progress_only():
    """No deprecations and no advice of the libraries; warnings of ours are heard."""
    run = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == ""
    assert [line for line in run.stderr.splitlines() if "Warning" in line] == ["<string>:11: UserWarning: ours"]
    assert not re.search("deprecat|soon gone|advice", run.stderr)
