"""Every stage of the engine by itself: milliseconds, images a second, operations, and their share of the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bench.flops import count_flops
from grounded_diffusion.bench.timing import Timing, repeat
from grounded_diffusion.bench.work import OBJECTS, Work
from grounded_diffusion.bundle import CPU, OPENVINO, TEXT_ENCODER, UNET, UNET_GROUNDED, VAE_DECODER, Manifest
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.dataset.formats import Settings, open_format
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.export.shapes import axis_sizes
from grounded_diffusion.kernels import image_epilogue, mask_epilogue

VARIANTS = {"onnxruntime-cpu": CPU, "openvino": OPENVINO}  # graphs that backends on a CPU run
PLAIN, GROUNDED, HEAD = "UNet, plain", "UNet, grounded", "head (grounded - plain)"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage at one batch size.

    Attributes:
        name: what runs.
        images: images at once, in all lanes; a UNet has twice as many rows.
        timing: seconds.
        flops: operations for these images; 0 where none are counted.
    """

    name: str
    images: int
    timing: Timing
    flops: int = 0

    def record(self, bound: float | None) -> dict[str, Any]:
        """JSON-ready; `bound` in operations a second."""
        rate = self.flops / self.timing.median if self.flops else None
        return {
            "name": self.name,
            "images": self.images,
            **self.timing.record(),
            "images_per_s": self.images / self.timing.median,
            "flops": self.flops,
            "flops_per_s": rate,
            "share_of_bound": rate / bound if rate and bound else None,
        }


def graph_inputs(pipe: GroundedPipeline, work: Work, timestep: float) -> dict[str, dict[str, np.ndarray]]:
    """What a guided call of every graph takes for the images of a round; embeddings are the prompts' own."""
    conditioning = pipe.condition(list(work.prompts))
    unet = {
        "latents": work.noise,
        "timestep": np.full(len(work.noise), timestep, np.float32),
        "context": conditioning.context,
    }
    return {
        TEXT_ENCODER: {"input_ids": np.stack([pipe.tokenizer.encode(prompt.text).ids for prompt in work.prompts])},
        UNET: unet,
        UNET_GROUNDED: unet | {"queries": conditioning.queries, "query_valid": conditioning.query_valid},
        VAE_DECODER: {"latents": work.noise},
    }


def difference(grounded: Timing, plain: Timing) -> Timing:
    """Of calls that took turns: run by run."""
    return Timing(tuple(g - p for g, p in zip(grounded.seconds, plain.seconds, strict=True)))


def measure_graphs(pipe: GroundedPipeline, work: Work, timestep: float, repeats: int) -> Iterator[Stage]:
    """The four graphs, taking turns, as many calls at once as the engine makes; and the head, as a difference."""
    lanes, (_, height, width) = pipe.backend.lanes, work.noise.shape[1:]
    sizes, inputs = axis_sizes(len(work.prompts), OBJECTS, height, width), graph_inputs(pipe, work, timestep)
    variant = next((prefix for name, prefix in VARIANTS.items() if pipe.backend.name.startswith(name)), "")
    files = {graph: pipe.bundle.variant(variant, graph) for graph in inputs}
    flops = {graph: lanes * sum(count_flops(file, sizes).values()) for graph, file in files.items()}
    seconds: dict[str, list[float]] = {graph: [] for graph in inputs}
    with ThreadPoolExecutor(lanes) as pool:

        def at_once(graph: str) -> None:
            list(pool.map(lambda _: pipe.backend.run(graph, inputs[graph]), range(lanes)))

        for _ in range(repeats):
            for graph in inputs:
                seconds[graph] += repeat(lambda graph=graph: at_once(graph), 1).seconds
    timings = {graph: Timing(tuple(values)) for graph, values in seconds.items()}
    images = lanes * len(work.prompts)
    names = {TEXT_ENCODER: "text encoder", UNET: PLAIN, UNET_GROUNDED: GROUNDED, VAE_DECODER: "VAE"}
    for graph, name in names.items():
        yield Stage(name, images, timings[graph], flops[graph])
    head = difference(timings[UNET_GROUNDED], timings[UNET])
    yield Stage(HEAD, images, head, flops[UNET_GROUNDED] - flops[UNET])


def measure_epilogues(pipe: GroundedPipeline, work: Work, options: Options, repeats: int) -> Iterator[Stage]:
    """From the network's numbers to bytes, and from a sample to files; the last for one image."""
    samples = list(pipe.generate(work.prompts, options, noise=work.noise, steps=1))
    batch, size = len(samples), samples[0].image.shape[:2]
    image = pipe.backend.run(VAE_DECODER, {"latents": np.stack([sample.latents for sample in samples])})["image"]
    logits = np.stack([sample.mask_logits for sample in samples])
    valid = np.ones(logits.shape[:2], np.bool_)
    yield Stage("image epilogue", batch, repeat(lambda: image_epilogue(image), repeats))
    yield Stage("mask epilogue", batch, repeat(lambda: mask_epilogue(logits, valid, size, options.threshold), repeats))
    form, record = open_format("folder", Settings()), Record.from_sample(samples[0])
    yield Stage("writer, folder format", 1, repeat(lambda: form.encode(record), repeats))


def torch_heads(checkpoint: Path, manifest: Manifest, work: Work, repeats: int) -> Iterator[Stage]:
    """The head in torch on features of one UNet call: plain, as released, and folded, as exported."""
    import torch

    from grounded_diffusion.bench.flops import count_torch_flops
    from grounded_diffusion.training.checkpoint import as_exported
    from grounded_diffusion.training.head.folded import fold

    model = as_exported(checkpoint, manifest)
    text, batch = model.text_encoder.config, len(work.prompts)
    noise = torch.from_numpy(work.noise).repeat(2, 1, 1, 1)
    context = torch.randn(2 * batch, text.max_position_embeddings, text.hidden_size)
    queries, valid = torch.randn(batch, OBJECTS, text.hidden_size), torch.ones(batch, OBJECTS, dtype=torch.bool)
    with torch.no_grad(), model.head.taps(model.unet) as taps:
        model.unet(noise, torch.ones(2 * batch), context)
        folded = fold(model.head)
        runs: dict[str, Callable[[], Any]] = {
            "head in torch, plain": lambda: model.head(taps.features(), queries, valid),
            "head in torch, folded": lambda: folded(taps.raw(), queries, valid),
        }
        for name, run in runs.items():
            yield Stage(name, batch, repeat(run, repeats), count_torch_flops(run))


def measure_stages(
    pipe: GroundedPipeline, work: Work, options: Options, repeats: int, checkpoint: Path | None
) -> list[Stage]:
    """All stages for one batch in each of the engine's lanes; the torch head only where there is a checkpoint."""
    schedule = pipe.schedule(options)
    timestep = schedule.rows[schedule.capture_index(pipe.bundle.manifest.capture_timestep)].timestep
    stages = [*measure_graphs(pipe, work, timestep, repeats), *measure_epilogues(pipe, work, options, repeats)]
    return stages + list(torch_heads(checkpoint, pipe.bundle.manifest, work, repeats) if checkpoint else ())
