"""A checkpoint in, a bundle out: trace, share weights, describe, verify, and only then let it appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir.passes import common as passes

from grounded_diffusion import __version__
from grounded_diffusion.bundle import (
    CONTEXT,
    CPU,
    CUDA,
    GPU,
    OPENVINO,
    TELLS_PRESENCE,
    TEXT_ENCODER,
    TIME,
    TOKENIZER,
    UNET,
    UNET_GROUNDED,
    VAE_DECODER,
    Manifest,
    sha256,
    write_manifest,
)
from grounded_diffusion.engine.backends.tensorrt.store import OBJECTS
from grounded_diffusion.engine.sampling.options import SAMPLING, Options
from grounded_diffusion.engine.sampling.schedule import build_schedule
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.cpu import cut, for_cpu, share_halves
from grounded_diffusion.export.graphs import latent_multiple, trace, without_grounding
from grounded_diffusion.export.openvino import cut_shared, decoder_for_openvino, for_openvino
from grounded_diffusion.export.rewrites.winograd import LARGEST, winograd
from grounded_diffusion.export.shapes import axis_sizes, graph_memory
from grounded_diffusion.export.staging import check_output, staged
from grounded_diffusion.export.weights import WeightStore
from grounded_diffusion.families import FAMILIES, SAMPLERS
from grounded_diffusion.training.checkpoint import PARTS, Checkpoint
from grounded_diffusion.training.generator.base import base_digest

MAKERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
Report = Callable[[str], None]


def describe(checkpoint: Checkpoint, precision: str) -> Manifest:
    """The manifest of a checkpoint, its files not yet listed."""
    unet, tokenizer = checkpoint.unet.config, checkpoint.tokenizer
    scale = checkpoint.vae_scale_factor
    size = checkpoint.latent_size
    return Manifest(
        family="stable-diffusion",
        image_size=(size[0] * scale, size[1] * scale),
        vae_scale_factor=scale,
        latent_channels=unet.in_channels,
        size_multiple=scale * latent_multiple(checkpoint),
        context_length=checkpoint.text_encoder.config.max_position_embeddings,
        context_dim=unet.cross_attention_dim,
        pooled_text=checkpoint.text_encoder_2 is not None,
        guidance_embedding=checkpoint.denoiser.told,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        scheduler={"_class_name": type(checkpoint.scheduler).__name__, **scheduler_config(checkpoint)},
        capture_timestep=checkpoint.capture_timestep,
        query_template=checkpoint.query_template,
        head=checkpoint.head.about() | told_presence(checkpoint),
        precision=precision,
        names=checkpoint.names,
        sampling=own_sampling(checkpoint),
        base=base_digest({part: getattr(checkpoint, part) for part in (*PARTS, "text_encoder_2")}),
        versions={"grounded-diffusion": __version__} | {name: version(name) for name in MAKERS},
    )


def told_presence(checkpoint: Checkpoint) -> dict:
    """What a manifest says of presence, where the model tells it."""
    if checkpoint.presence is None:
        return {}
    return {TELLS_PRESENCE: [name for name, _, _ in checkpoint.presence.config.layers]}


def own_sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a run that says nothing draws: as the checkpoint says, else as its family and its scheduler do.

    Raises UsageError for what the model's scheduler does not allow.
    """
    family, kind = FAMILIES[checkpoint.family], type(checkpoint.scheduler).__name__
    own: dict[str, Any] = dict(steps=family.steps, guidance_scale=family.guidance_scale, guidance_interval=(0.0, 1.0))
    own |= {"sampler": SAMPLERS[kind]} if kind in SAMPLERS else {}
    try:
        options = Options(**own | checkpoint.sampling)
        sampler, steps = options.sampler or SAMPLING["sampler"], options.steps or family.steps
        build_schedule(scheduler_config(checkpoint), sampler, steps)
    except UsageError as error:
        raise UsageError(f"runs of this model would fail: {error}; say how to sample, as with --sampler") from None
    return {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}


def scheduler_config(checkpoint: Checkpoint) -> dict:
    """The scheduler's own configuration, as its JSON file has it."""
    return {key: value for key, value in checkpoint.scheduler.config.items() if key != "_use_default_values"}


def write_bundle(checkpoint: Checkpoint, folder: Path, precision: str, fused: bool, report: Report) -> None:
    """Write all files of a bundle into `folder`, the manifest last."""
    store, written = WeightStore(folder), []
    keys_values: dict[str, str] = {}

    def write(model: onnx_ir.Model, name: str) -> None:
        if name in written:  # what both UNets need of the context and the timestep
            return
        store.move(model)
        (folder / name).parent.mkdir(exist_ok=True)
        onnx_ir.save(model, folder / name)
        written.append(name)

    traces = [(graph, "") for graph in (TEXT_ENCODER, VAE_DECODER, UNET_GROUNDED)]
    traces += [(graph, CUDA) for graph in (VAE_DECODER, UNET_GROUNDED) if fused]
    for graph, place in traces:
        report(f"tracing {place}{graph}")
        model = trace(checkpoint, graph, precision, cuda=bool(place))
        if graph != UNET_GROUNDED:
            write(model, f"{place}{graph}")
            if graph == VAE_DECODER and precision == "fp32":
                write(for_cpu(model), f"{CPU}{graph}")
                write(decoder_for_openvino(model), f"{OPENVINO}{graph}")
            continue
        for name, unet in ((graph, model), (UNET, without_grounding(model))):
            if not place:
                write(unet, name)
            variants = {place or GPU: gpu_unet(unet, name)}
            if precision == "fp32":
                small = max(checkpoint.latent_size) <= LARGEST
                variants |= {CPU: cpu_unet(unet, small, name), OPENVINO: openvino_unet(unet, name)}
            for prefix, parts in variants.items():
                for file, part in parts:
                    write(part, f"{prefix}{file}")
                    if (prefix, file) == (GPU, CONTEXT):
                        keys_values = {v.name: ",".join(map(str, v.shape)) for v in part.graph.outputs}
        del model, unet
    checkpoint.tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    manifest = describe(checkpoint, precision)
    files = (*written, TOKENIZER, *store.files)
    digests = {name: sha256(folder / name) for name in files}
    sizes = axis_sizes(1, OBJECTS, *checkpoint.latent_size)
    on_gpu = [name for name in written if name.startswith((GPU, CUDA)) or name in (TEXT_ENCODER, VAE_DECODER)]
    memory = {name: graph_memory(folder / name, sizes) for name in on_gpu}
    write_manifest(folder, replace(manifest, files=digests, keys_values=keys_values, memory=memory))


def cpu_unet(unet: onnx_ir.Model, small: bool, name: str) -> Iterator[tuple[str, onnx_ir.Model]]:
    """A UNet for ONNX Runtime's CPU provider, of `small` latents or others, and what it needs of the context."""
    own = for_cpu(unet)
    context = cut(own, "context")
    share_halves(own)
    if small:
        winograd(own)
    yield from {name: own, CONTEXT: context}.items()


def gpu_unet(unet: onnx_ir.Model, name: str) -> Iterator[tuple[str, onnx_ir.Model]]:
    """A UNet for a GPU, of standard operators or of fused ones, and what it needs of the context."""
    own = unet.clone()
    passes.ShapeInferencePass()(own)
    context = cut(own, "context")
    share_halves(own)
    for value in (*own.graph.inputs, *context.graph.inputs, *context.graph.outputs):
        if value.name.startswith("context"):
            value.shape = onnx_ir.Shape(["N", *value.shape[1:]])
    yield from {name: own, CONTEXT: context}.items()


def openvino_unet(unet: onnx_ir.Model, name: str) -> Iterator[tuple[str, onnx_ir.Model]]:
    """A UNet for OpenVINO, and what it needs of the context and of the timestep."""
    own = for_openvino(unet)
    context, time = cut_shared(own)
    yield from {name: own, CONTEXT: context, TIME: time}.items()


def export_bundle(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    precision: str = "fp32",
    fused: bool = False,
    verify: Callable[[Checkpoint, Path], None] | None = None,
    overwrite: bool = False,
    report: Report = lambda line: None,
) -> None:
    """Export a checkpoint as a bundle directory.

    Args:
        checkpoint: what to export.
        out: the bundle's directory; must be absent or empty, or hold a bundle where `overwrite` is true.
        precision: "fp32" or "fp16"; see export/rewrites/half.py.
        fused: also write FP16 graphs of ONNX Runtime's fused operators, for its CUDA provider; see
            export/rewrites/fused.py.
        verify: called with the checkpoint and the finished directory before it appears at `out`; what it raises
            leaves no bundle.
        report: told, in one line each, what is going on.

    Raises:
        UsageError: `out` cannot be used, or `fused` without "fp16".
        ParityError: from `verify`.
    """
    out = Path(out)
    if fused and precision != "fp16":
        raise UsageError("the graphs of fused operators are of fp16; give --precision fp16 with --fused")
    check_output(out, overwrite)
    own_sampling(checkpoint)  # raises before the minutes that tracing takes
    with staged(out) as work:
        write_bundle(checkpoint, work, precision, fused, report)
        if verify:
            verify(checkpoint, work)
