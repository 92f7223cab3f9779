"""The torch modules behind each of a bundle's graphs, and how they become ONNX.

Only the grounded UNet is traced. The plain one is the same graph without what leads to the mask logits, so the two
share their weights by construction.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import nn
from torch.export import Dim

from grounded_diffusion.bundle import GRAPH_IO, OPTIONAL_OUTPUTS, TEXT_ENCODER, UNET, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.export.rewrites.fused import fuse_silu, fused
from grounded_diffusion.export.rewrites.half import FLOAT, HALF, to_half
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.head.folded import fold

OPSET = 20
EXAMPLE_GUIDANCE = 8.0
EXAMPLE_BATCH, EXAMPLE_OBJECTS = 2, 3  # not 1, which the tracer would take for a constant
SAME_TYPE = ("InstanceNormalization", "Mul", "Reshape", "Transpose")  # ops whose output has their first input's type
MAX_TRACED_BATCH = 31  # diffusers copies a tensor first from 64 rows on; the tracer has to know it is on one side


class TextEncoder(nn.Module):
    """input_ids [B,77] int64 -> context [B,L,D]."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.tower = checkpoint.tower

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.tower(input_ids)


class GroundedUNet(nn.Module):
    """UNet and folded grounding head in one: see GRAPH_IO for the inputs and outputs."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.denoiser, self.head, self.presence = checkpoint.denoiser, fold(checkpoint.head), checkpoint.presence
        self.taps = lambda unet: checkpoint.head.taps(unet)  # of whichever copy of this module runs, see `swapped`

    def forward(self, latents, timestep, context, queries, query_valid):
        with self.taps(self.denoiser.unet) as taps, contextlib.ExitStack() as stack:
            seen = self.presence and stack.enter_context(self.presence.taps(self.denoiser.unet))
            model_output = self.denoiser(latents, timestep, context)
            if seen is None:
                return model_output, self.head(taps.raw(), queries, query_valid)
            mask_logits, states = self.head.with_states(taps.raw(), queries, query_valid)
            return model_output, mask_logits, self.presence(seen.raw(), mask_logits, queries, states)


class PlainUNet(nn.Module):
    """The UNet alone."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.denoiser = checkpoint.denoiser

    def forward(self, latents, timestep, context):
        return self.denoiser(latents, timestep, context)


class Decoder(nn.Module):
    """Latents [B,4,h,w] as the loop leaves them -> image [B,3,H,W] in [-1,1]; undoes the latent's scaling."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self.vae = checkpoint.vae
        self.scale, self.shift = self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]


class RowwiseGroupNorm(nn.Module):
    """A GroupNorm that averages rows, then an image, then a group's channels; [B,C,h,w] or [B,C,n] -> the same.

    ONNX Runtime adds up the millions of values of a group at 512x512 one by one in float32, which alone is off by
    1e-5; short sums are off by 1e-7. Nothing of the image's size is regrouped, which OpenVINO would do in memory.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (vector.view(-1, *[1] * (x.ndim - 2)) for vector in (self.weight, self.bias))
        centred = x - self.average(x)
        return centred * (torch.rsqrt(self.average(centred * centred) + self.eps) * weight) + bias

    def average(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of every channel's group, [B,C,1,1] or [B,C,1]."""
        for axis in range(x.ndim - 1, 1, -1):
            x = x.mean(axis, keepdim=True)
        grouped = x.unflatten(1, (self.groups, -1))
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1, 2)


def swapped(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of a module with inner ones replaced, where they have a replacement; it shares the original's weights."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if (other := replacement(child)) is not None:
                setattr(parent, name, other)
    return twin


def rowwise(module: nn.Module) -> nn.Module | None:
    """Takes the place of a GroupNorm."""
    return RowwiseGroupNorm(module) if isinstance(module, nn.GroupNorm) else None


MODULES = {TEXT_ENCODER: TextEncoder, UNET: PlainUNet, UNET_GROUNDED: GroundedUNet, VAE_DECODER: Decoder}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of one run of the graphs: B images, O objects, latents of h x w."""

    batch: int
    objects: int
    height: int
    width: int


def outputs_of(checkpoint: Checkpoint, graph: str) -> dict[str, str]:
    """A graph's outputs: those of GRAPH_IO, and what this checkpoint tells besides."""
    more = OPTIONAL_OUTPUTS.get(graph, {}) if checkpoint.presence is not None else {}
    return GRAPH_IO[graph][1] | more


def latent_multiple(checkpoint: Checkpoint) -> int:
    """h and w must be multiples of this: of the UNet's down-sampling and of the head's."""
    return math.lcm(2 ** (len(checkpoint.unet.config.block_out_channels) - 1), checkpoint.head.latent_multiple)


def random_ids(checkpoint: Checkpoint, count: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids [count,77] of random words, of different lengths, between begin and end as a prompt has them."""
    text, tokenizer = checkpoint.text_encoder.config, checkpoint.tokenizer
    ids = torch.randint(0, text.vocab_size, (count, text.max_position_embeddings), generator=generator)
    words = torch.randint(3, text.max_position_embeddings, (count, 1), generator=generator)
    ids = torch.where(torch.arange(text.max_position_embeddings) < words, ids, tokenizer.eos_token_id)
    ids[:, 0] = tokenizer.bos_token_id
    return ids


@torch.no_grad()
def example_inputs(checkpoint: Checkpoint, graph: str, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of one graph, by name; the last object of the last image is padding.

    Embeddings come from the text encoder. A trained UNet's attention saturates on plain Gaussian ones, and float32 then
    differs from float64 by 1e-3, in torch as anywhere, which says nothing about the export.
    """
    g = torch.Generator().manual_seed(seed)
    b, o = sizes.batch, sizes.objects
    if graph == TEXT_ENCODER:
        return {"input_ids": random_ids(checkpoint, b, g)}
    latents = torch.randn(b, checkpoint.unet.config.in_channels, sizes.height, sizes.width, generator=g)
    if graph == VAE_DECODER:
        return {"latents": latents}
    embed = lambda n: checkpoint.tower(random_ids(checkpoint, n, g))  # [n,L,D]
    context = lambda n: checkpoint.denoiser.with_guidance(embed(n), EXAMPLE_GUIDANCE)
    valid = torch.ones(b, o, dtype=torch.bool)
    valid[-1, -1] = o == 1
    inputs = {
        "latents": latents.repeat(2, 1, 1, 1),
        "timestep": torch.full((2 * b,), float(checkpoint.capture_timestep)),
        "context": context(2 * b),
        "queries": embed(b * o)[:, 2].unflatten(0, (b, o)),
        "query_valid": valid,
    }
    return {name: inputs[name] for name in GRAPH_IO[graph][0]}


def _dynamic_shapes(checkpoint: Checkpoint, graph: str) -> dict[str, dict[int, Any]]:
    """Which axes may change: the batch everywhere, N = 2B on guided inputs, O, and h and w in steps."""
    batch, multiple = Dim("B", min=1, max=MAX_TRACED_BATCH), latent_multiple(checkpoint)
    axis = {"B": batch, "N": 2 * batch, "O": Dim("O", min=1, max=512)}
    axis |= {side: multiple * Dim(side + "_steps", min=1) for side in "hw"}
    return {
        name: {i: axis[symbol] for i, symbol in enumerate(shape.split(",")) if symbol in axis}
        for name, shape in GRAPH_IO[graph][0].items()
    }


@contextlib.contextmanager
def quiet():
    """Keep the exporter's own chatter from the user: it speaks of passes and of versions it converts between."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(checkpoint: Checkpoint, graph: str, precision: str = "fp32", cuda: bool = False) -> onnx_ir.Model:
    """One graph as an ONNX model in memory, of "fp32" (its weights are still the torch tensors) or "fp16" precision.

    `cuda` makes it one of ONNX Runtime's fused operators, see export/rewrites/fused.py.
    """
    module = MODULES[graph](checkpoint).eval()
    if cuda:
        module = swapped(module, fused)
    elif graph == VAE_DECODER and precision == "fp32":  # the one graph at full image size: a few more passes are lost
        module = swapped(module, rowwise)
    model = capture(checkpoint, graph, module)
    if cuda:
        fuse_silu(model)
    if precision == "fp16":
        upcast = graph == VAE_DECODER and FAMILIES[checkpoint.family].fp32_decoder
        return to_half(model, graph, inside=FLOAT if upcast else HALF)
    return model


def capture(checkpoint: Checkpoint, graph: str, module: nn.Module) -> onnx_ir.Model:
    """The ONNX model in memory of a module that is one of the checkpoint's graphs, in single precision."""
    multiple = 2 * latent_multiple(checkpoint)
    inputs = example_inputs(
        checkpoint, graph, Sizes(EXAMPLE_BATCH, EXAMPLE_OBJECTS, multiple, multiple + multiple // 2)
    )
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            module,
            kwargs=inputs,
            input_names=list(GRAPH_IO[graph][0]),
            output_names=list(outputs_of(checkpoint, graph)),
            dynamic_shapes=_dynamic_shapes(checkpoint, graph),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        return tidy(program.model, graph)


def tidy(model: onnx_ir.Model, graph: str) -> onnx_ir.Model:
    """Fold constants, drop what is unused or said twice, and name the axes as GRAPH_IO does.

    These are the passes the exporter would run, without its search for patterns to fuse, which takes longer than the
    rest together and which every backend does for itself. What the exporter notes for its developers goes as well:
    stack traces with paths of this machine are among it.
    """
    onnxscript.optimizer.fold_constants(model)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    drop_casts(model)
    model.producer_name, model.producer_version = "grounded-diffusion", None
    name_axes(model, graph)
    return model


def element_type(value: onnx_ir.Value) -> onnx_ir.DataType | None:
    """A value's type; the exporter leaves it open inside a group norm, where it is that of what comes in."""
    producer = value.producer()
    inside = value.dtype is None and producer is not None and producer.op_type in SAME_TYPE
    return element_type(producer.inputs[0]) if inside else value.dtype


def drop_casts(model: onnx_ir.Model) -> None:
    """Remove CastLike nodes between equal types: they do nothing, but hide group norms from the backends' fusions."""
    for node in list(model.graph):
        if node.op_type == "CastLike" and element_type(node.inputs[0]) == element_type(node.inputs[1]) is not None:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)


def name_axes(model: onnx_ir.Model, graph: str) -> None:
    """Give the free axes of a graph's inputs and outputs the names of GRAPH_IO; fixed sizes stay numbers."""
    names_in, names_out = GRAPH_IO[graph]
    for values, shapes in (
        (model.graph.inputs, names_in), (model.graph.outputs, names_out | OPTIONAL_OUTPUTS.get(graph, {})),
    ):  # fmt: skip
        for value in values:
            symbols = shapes[value.name].split(",")
            value.shape = onnx_ir.Shape(
                [size if isinstance(size, int) else symbol for size, symbol in zip(value.shape, symbols, strict=True)]
            )


def without_grounding(model: onnx_ir.Model) -> onnx_ir.Model:
    """The plain UNet of a grounded one: a copy with only GRAPH_IO[UNET]'s inputs and outputs. Weights are shared."""
    plain = model.clone()
    names_in, names_out = GRAPH_IO[UNET]
    graph = plain.graph
    graph.outputs[:] = [value for value in graph.outputs if value.name in names_out]
    passes.RemoveUnusedNodesPass()(plain)
    graph.inputs[:] = [value for value in graph.inputs if value.name in names_in]
    return plain
