"""Time of a guided step and of an image on GPUs, from the kernels of a bundle's graphs. **A model, not measured.**

A kernel takes the longer of its operations, at the rate that such kernels reach, and its bytes, at that of the memory;
beside that the gap between two kernels of a replayed CUDA graph. Products are cut into tiles, whose last wave leaves
multiprocessors idle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grounded_diffusion.bench.gpu.kernels import Kernel, Library, kernels
from grounded_diffusion.bundle import CUDA, FP8, GPU, UNET, VAE_DECODER, Bundle
from grounded_diffusion.engine.backends.gpu.needs import counted_memory, sizes_of
from grounded_diffusion.engine.backends.tensorrt.store import OBJECTS
from grounded_diffusion.engine.sampling.batch import decoded_at_once
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.shapes import axis_sizes


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU by its maker's data sheet: dense FP16 products summed in FP32, memory, and multiprocessors."""

    flops: float
    bandwidth: float
    processors: int


CARDS = {
    "H100 SXM": Card(989e12, 3.35e12, 132),
    "RTX 4090": Card(165e12, 1.008e12, 128),
    "L4": Card(121e12, 0.3e12, 58),
}
# Shares of the data sheet's rate that kernels reach. Products: 790 TFLOP/s are published for an H100. The others are
# assumptions: implicit products of 3x3 convolutions and attention at heads of 40 to 160 reach less than plain ones.
REACHED = {"product": 0.8, "convolution": 0.7, "attention": 0.45, "other": 1.0}
FP8_RATE = 2  # times FP16's, summed in FP32 as well, by the data sheets of all three
MEMORY_REACHED = 0.85  # assumed
GAP = 1.5e-6  # seconds between two kernels of a replayed graph; assumed
TILE = (128, 128)  # rows and columns of a product that a multiprocessor makes at once
SPLIT = 0.25  # of the multiprocessors at least: small products are cut along what they sum over, too
FORMS: dict[str, tuple[str, Library]] = {  # backends: which graphs, and how they run
    "TensorRT": (GPU, "compiled"),
    "TensorRT, FP8": (FP8, "compiled"),
    "ONNX Runtime, fused graphs": (CUDA, "node by node"),
    "ONNX Runtime": (GPU, "node by node"),
}
STEPS = 20
TARGET = 450e12  # FLOP/s on an H100 at batch 16


def seconds(kernel: Kernel, card: Card) -> float:
    """What one kernel takes."""
    rate = card.flops * REACHED[kernel.kind] * (FP8_RATE if kernel.fp8 else 1)
    if kernel.rows:
        tiles = -(-kernel.rows // TILE[0]) * -(-kernel.columns // TILE[1])
        full = kernel.rows * kernel.columns / (TILE[0] * TILE[1])
        waves = -(-tiles // card.processors)
        rate *= min(1.0, full / (waves * card.processors)) if waves > 1 else max(full / card.processors, SPLIT)
    return max(kernel.flops / rate, kernel.bytes / (card.bandwidth * MEMORY_REACHED)) + GAP


def total(found: Iterable[Kernel], card: Card) -> float:
    """Seconds of kernels that run one after the other."""
    return sum(seconds(kernel, card) for kernel in found)


def model_gpus(bundle: Bundle, batches: tuple[int, ...]) -> dict[str, Any]:
    """Times, rates and memory of every card, backend and batch.

    Raises:
        UsageError: a bundle that is not of FP16, which the rates are for.
    """
    manifest = bundle.manifest
    if manifest.precision != "fp16":
        raise UsageError("the model is of FP16; export the bundle with --precision fp16")
    height, width = (side // manifest.vae_scale_factor for side in manifest.image_size)
    rows = []
    for backend, (prefix, library) in FORMS.items():
        if f"{prefix}{UNET}" not in manifest.files:
            continue
        for batch in batches:
            unet, decoder = (bundle.variant(prefix, graph) for graph in (UNET, VAE_DECODER))
            parts = decoded_at_once(batch, height * width)
            step = kernels(unet, axis_sizes(batch, OBJECTS, height, width), library)
            decode = kernels(decoder, axis_sizes(parts, OBJECTS, height, width), library)
            sizes = sizes_of(bundle, batch, OBJECTS, manifest.image_size)
            memory = counted_memory(bundle, prefix, sizes) if library == "node by node" else None  # in engine.json
            rows += [row(backend, batch, step, decode, batch / parts, memory, *card) for card in CARDS.items()]
    guided = sum(k.flops for k in kernels(bundle.file(UNET), axis_sizes(1, OBJECTS, height, width), "node by node"))
    return {"rows": rows, "standard_flops": guided, "image_size": list(manifest.image_size)}


def row(backend: str, batch: int, step: list[Kernel], decode: list[Kernel], decodings: float, memory: int | None,
        name: str, card: Card) -> dict[str, Any]:  # fmt: skip
    """One line of the table."""
    time, flops = total(step, card), sum(kernel.flops for kernel in step)
    image = (STEPS * time + decodings * total(decode, card)) / batch
    by_kind = {kind: total((k for k in step if k.kind == kind), card) / time for kind in REACHED}
    return {
        "card": name, "backend": backend, "batch": batch, "step_s": time, "flops": flops, "flops_per_s": flops / time,
        "kernels": len(step), "images_per_s": 1 / image, "memory": memory, "share": by_kind,
    }  # fmt: skip


def model_table(result: Mapping[str, Any]) -> list[str]:
    """The model as Markdown."""
    height, width = result["image_size"]
    head = [f"guided steps at {height}x{width}, modelled", "batch", "kernels", "ms a step", "TFLOP/s"]
    head += [f"images/s, {STEPS} steps", "GB"]
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|--:|"]
    for r in result["rows"]:
        memory = "" if r["memory"] is None else f"{r['memory'] / 1e9:.1f}"
        figures = f"{r['step_s'] * 1e3:.2f} | {r['flops_per_s'] / 1e12:.0f} | {r['images_per_s']:.1f} | {memory}"
        lines.append(f"| {r['card']}, {r['backend']} | {r['batch']} | {r['kernels']} | {figures} |")
    return lines
