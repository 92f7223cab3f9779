"""Parity: every graph against its torch module, and the engine's whole loop against diffusers' own pipeline."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from grounded_diffusion.bundle import CPU, CUDA, GPU, GRAPHS, OPENVINO, Bundle, open_bundle, read_manifest
from grounded_diffusion.engine import GroundedPipeline, Prompt
from grounded_diffusion.engine.backends.onnxruntime_cpu import OnnxRuntimeBackend
from grounded_diffusion.errors import ParityError
from grounded_diffusion.export.graphs import MODULES, Sizes, example_inputs, latent_multiple, outputs_of
from grounded_diffusion.export.reference import generate
from grounded_diffusion.export.rewrites.fused import as_standard
from grounded_diffusion.training.checkpoint import Checkpoint

GUIDANCE_SCALE = 7.5
LARGE = 2048  # latent cells; models above are checked with one image and few steps, others with two and more
MOST = 4096  # latent cells; models above are checked at a smaller size, as attention takes memory by the square of them
FALLBACK_NAMES = ["dog", "cat"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """graph: relative L2 of each output; difference: of the attention head's logits, which are a small difference of
    large numbers; image: dB of PSNR, on 8-bit images; mask: IoU, of each or of all as one."""

    graph: float
    difference: float
    image: float
    mask: float
    each: bool


# FP16 rounds by 2^-11 = 4.9e-4; a graph may be eight times that off. A mask of 30 pixels that loses one is at 0.97.
TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 50.0, 0.999, each=True),
    "fp16": Tolerance(4e-3, 4e-3, 35.0, 0.99, each=False),
}


@dataclass(frozen=True, slots=True)
class Parity:
    """One measured agreement: `value` must be at most (or, where `at_least`, at least) `tolerance`."""

    what: str
    measure: str
    value: float
    tolerance: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """False for a NaN too."""
        return self.value >= self.tolerance if self.at_least else self.value <= self.tolerance


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|, in float64."""
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit images; infinite for equal ones."""
    error = np.square(actual.astype(np.float64) - expected).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def mask_iou(actual: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union of two masks; 1 when both are empty."""
    union = (actual | expected).sum()
    return float((actual & expected).sum() / union) if union else 1.0


class Frugal(OnnxRuntimeBackend):
    """A backend that has each weight once, where the engine's own keeps a second copy as its kernels like it best."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, sessions=1, **options)
        self._options.enable_cpu_mem_arena = False
        self._options.add_session_config_entry("session.disable_prepacking", "1")


class FusedOnCpu(Frugal):
    """CUDA's graphs on the CPU, in the standard operators that its fused ones stand for."""

    def _model(self, path: Path) -> bytes:
        return as_standard(onnx.load(path, load_external_data=False)).SerializeToString()


def checked_size(size: Sequence[int], step: int) -> tuple[int, ...]:
    """(h, w) of the latents that are compared: a model's own, or MOST cells of its shape, in multiples of `step`."""
    shrink = min(1.0, math.sqrt(MOST / math.prod(size)))
    return tuple(max(step, round(side * shrink) // step * step) for side in size)


def check_graphs(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Every graph's outputs against its module's, at `checked_size` and, batched, at a small oblong one."""
    step = latent_multiple(checkpoint)
    height, width = checked_size(checkpoint.latent_size, step)
    shapes = [Sizes(1, 1, height, width), Sizes(3, 4, 2 * step, 3 * step)]
    manifest, rows = read_manifest(folder), []
    tolerance = TOLERANCES[manifest.precision]
    for graph in GRAPHS:
        names, module = list(outputs_of(checkpoint, graph)), MODULES[graph](checkpoint).eval()
        inputs = [example_inputs(checkpoint, graph, sizes, seed) for seed, sizes in enumerate(shapes)]
        with torch.no_grad():
            outputs = [module(**given) for given in inputs]
        del module
        expected = [[value.numpy() for value in (o if isinstance(o, tuple) else (o,))] for o in outputs]
        calls = [{name: value.numpy() for name, value in given.items()} for given in inputs]
        for prefix in ("", CPU, GPU, CUDA, OPENVINO):
            if f"{prefix}{graph}" not in manifest.files:
                continue
            backend = (FusedOnCpu if prefix == CUDA else Frugal)(Bundle(folder, manifest), variant=prefix)
            worst = dict.fromkeys(names, 0.0)
            for call, wanted in zip(calls, expected, strict=True):
                actual = backend.run(graph, call)
                for name, value in zip(names, wanted, strict=True):
                    error = relative_l2(actual[name], value)
                    worst[name] = max(worst[name], error if math.isfinite(error) else math.inf)
            for name, error in worst.items():
                less = name == "mask_logits" and manifest.head["variant"] == "attention"
                bound = tolerance.difference if less else tolerance.graph
                rows.append(Parity(f"{prefix}{graph} {name}", "relative L2", error, bound))
            del backend
            gc.collect()
    return rows


def check_loop(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Images and masks from the engine against diffusers' pipeline and the plain head, from the same noise."""
    height, width = checked_size(checkpoint.latent_size, latent_multiple(checkpoint))
    scale = checkpoint.vae_scale_factor
    large = height * width > LARGE
    names = [*(name for group in checkpoint.names.values() for name in group), *FALLBACK_NAMES][:2]
    prompts = [f"a photograph of a {names[0]} and a {names[1]}", f"a photograph of a {names[0]}"][: 1 if large else 2]
    steps = 3 if large else 10
    noise = torch.randn(
        len(prompts), checkpoint.unet.config.in_channels, height, width, generator=torch.Generator().manual_seed(0)
    )
    bundle = freely_sampled(open_bundle(folder))
    tolerance = TOLERANCES[bundle.manifest.precision]
    backend = OnnxRuntimeBackend(bundle, sessions=1 if large else len(GRAPHS))  # two UNets beside torch's are too much
    samples = list(
        GroundedPipeline(bundle, backend).generate(
            [Prompt(prompt, tuple(names)) for prompt in prompts],
            noise=noise.numpy(),
            sampler="ddim",
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            guidance_interval=(0.0, 1.0),
            batch=len(prompts),
            size=(height * scale, width * scale),
        )
    )
    del backend
    gc.collect()
    capture = samples[0].capture_timestep
    expected = generate(checkpoint, prompts, names, noise, steps, GUIDANCE_SCALE, capture)
    images = [psnr(sample.image, image) for sample, image in zip(samples, expected.images.numpy(), strict=True)]
    masks = np.array([[sample.masks[name] for name in names] for sample in samples]), expected.masks.numpy()
    apart = (part.reshape(-1, height * width * scale**2) for part in masks)  # one row a mask
    iou = min(map(mask_iou, *apart)) if tolerance.each else mask_iou(*masks)
    what = f"{steps} steps of DDIM against diffusers"
    return [
        Parity(what, "image PSNR, dB", min(images), tolerance.image, at_least=True),
        Parity(f"masks read at timestep {capture:g}", "mask IoU", iou, tolerance.mask, at_least=True),
    ]


def freely_sampled(bundle: Bundle) -> Bundle:
    """The bundle without the whole schedule that its scheduler may be given, which diffusers' pipelines do not read."""
    scheduler = {name: value for name, value in bundle.manifest.scheduler.items() if name != "timesteps"}
    return replace(bundle, manifest=replace(bundle.manifest, scheduler=scheduler))


def table(rows: list[Parity]) -> list[str]:
    """The measurements as aligned lines."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'parity':{width}}  {'measure':<14}  {'measured':>9}  {'tolerance':>10}"]
    for row in rows:
        bound = f"{'>=' if row.at_least else '<='} {row.tolerance:g}"
        verdict = "" if row.passed else "  FAILED"
        lines.append(f"{row.what:{width}}  {row.measure:<14}  {row.value:9.4g}  {bound:>10}{verdict}")
    return lines


def verify_bundle(checkpoint: Checkpoint, folder: Path, report: Callable[[str], None] = lambda line: None) -> None:
    """Measure all parities of a finished bundle directory and report them as a table.

    Raises:
        ParityError: one is out of tolerance.
    """
    report("comparing the graphs with torch")
    rows = check_graphs(checkpoint, folder)
    report("comparing the whole loop with diffusers")
    rows += check_loop(checkpoint, folder)
    for line in table(rows):
        report(line)
    if failed := [row for row in rows if not row.passed]:
        worst = "; ".join(f"{row.what}: {row.measure} {row.value:.4g}, tolerance {row.tolerance:g}" for row in failed)
        raise ParityError(f"the export disagrees with the checkpoint, so no bundle was written ({worst})")
