"""The model of a GPU's time: kernels counted on graphs, and each one's seconds."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir
import pytest

from grounded_diffusion.bench import cli
from grounded_diffusion.bench.flops import count_flops
from grounded_diffusion.bench.gpu.kernels import Kernel, kernels
from grounded_diffusion.bench.gpu.model import CARDS, GAP, MEMORY_REACHED, REACHED, model_gpus, seconds
from grounded_diffusion.bundle import GPU, UNET, open_bundle
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.rewrites.fp8 import products, to_fp8
from grounded_diffusion.export.shapes import axis_sizes

H100 = CARDS["H100 SXM"]
SIZES = axis_sizes(2, 8, 16, 16)
ATTENTIONS = 14  # of the tiny UNet


@pytest.mark.parametrize("library", ["compiled", "node by node"])
def test_kernels_do_all_operations_of_a_graph(half_bundle, library):
    path = half_bundle / GPU / UNET
    found = kernels(path, SIZES, library)
    assert sum(kernel.flops for kernel in found) == sum(count_flops(path, SIZES).values())


def test_a_compiler_fuses_attention_and_what_is_element_by_element(half_bundle):
    path = half_bundle / GPU / UNET
    fused, single = (kernels(path, SIZES, library) for library in ("compiled", "node by node"))
    assert sum(kernel.kind == "attention" for kernel in fused) == ATTENTIONS
    assert not any(kernel.kind == "attention" for kernel in single)
    assert len(fused) < len(single) / 2
    assert sum(kernel.bytes for kernel in fused) < sum(kernel.bytes for kernel in single) / 2


def test_a_kernel_waits_for_memory_or_for_operations():
    second = round(H100.bandwidth * MEMORY_REACHED)
    assert seconds(Kernel("other", 0, second), H100) == pytest.approx(1 + GAP)
    attention = Kernel("attention", round(H100.flops * REACHED["attention"]), second // 2)
    assert seconds(attention, H100) == pytest.approx(1 + GAP)


def test_the_last_wave_of_tiles_leaves_processors_idle():
    full = Kernel("product", 10**15, 0, rows=128 * H100.processors, columns=128)
    more = replace(full, rows=128 * (H100.processors + 1))
    assert seconds(full, H100) == pytest.approx(10**15 / (H100.flops * REACHED["product"]) + GAP)
    assert seconds(more, H100) == pytest.approx(
        2 * seconds(full, H100) * H100.processors / (H100.processors + 1), rel=1e-3
    )


def test_a_table_of_every_card(half_bundle, capsys):
    assert cli.main(["gpu-model", "--model", str(half_bundle), "--batch", "2"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {card}, TensorRT | 2 |" in said for card in CARDS)
    assert said.endswith("A model of counted operations and bytes, not measured.\n")


def test_slower_cards_are_slower(half_bundle):
    rows = model_gpus(open_bundle(half_bundle), (4,))["rows"]
    steps = {row["card"]: row["step_s"] for row in rows if row["backend"] == "TensorRT"}
    assert steps["H100 SXM"] <= steps["RTX 4090"] <= steps["L4"]


def test_products_of_fp8_take_half_the_time(half_bundle, tmp_path):
    model = onnx_ir.load(half_bundle / GPU / UNET)
    onnx_ir.external_data.set_base_dir(model.graph, half_bundle)
    to_fp8(model, {value.name: 1.0 for node in products(model) for value in node.inputs[:1]})
    onnx_ir.save(model, tmp_path / UNET)
    plain, small = (kernels(path, SIZES, "compiled") for path in (half_bundle / GPU / UNET, tmp_path / UNET))
    assert len(plain) == len(small)
    kinds = {kernel.kind for before, after in zip(plain, small, strict=True) if after.fp8 for kernel in (before, after)}
    assert kinds == {"convolution", "product"}
    for before, after in zip(plain, small, strict=True):
        assert (after.flops, after.rows, after.columns) == (before.flops, before.rows, before.columns)
        assert after.bytes < before.bytes if after.fp8 else after == before
    long = Kernel("product", 10**15, 0, rows=128 * H100.processors, columns=128)
    assert seconds(replace(long, fp8=True), H100) == pytest.approx(seconds(long, H100) / 2, rel=1e-4)


def test_single_precision_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="export the bundle with --precision fp16"):
        model_gpus(open_bundle(tiny_bundle), (1,))
