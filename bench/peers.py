"""What a user would run instead, with the same model, prompts, noise, solver, steps and guidance.

- `eager`: diffusers' pipeline; at the captured step the UNet's full features are concatenated and go through the plain
  head, as the released program does it.
- `compile`: the same, with UNet, head and decoder through torch.compile.
- `onnxruntime`: the same, with UNet, head and decoder exported by torch.onnx.export at the very size and run by ONNX
  Runtime with its default session options.

All are spared what the engine is spared: object queries are encoded beforehand, and the head runs at one step only.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from grounded_diffusion.bench.timing import repeat
from grounded_diffusion.bench.work import EVERY_STEP, Output, Work
from grounded_diffusion.engine import Options, Prompt
from grounded_diffusion.errors import BackendError, UsageError
from grounded_diffusion.export.reference import object_queries, reference_pipeline
from grounded_diffusion.training.checkpoint import Checkpoint, load_checkpoint
from grounded_diffusion.training.head.head import GroundingHead, upsample_logits
from grounded_diffusion.training.head.taps import Taps

SCHEDULERS = {  # the engine's samplers that draw no noise of their own, by diffusers' names
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}
Part = Callable[..., Any]


class PlainGrounding(nn.Module):
    """A UNet and the plain head on its features: latents, timestep, context, queries, query_valid -> output, logits."""

    def __init__(self, unet: nn.Module, head: GroundingHead):
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self.unet, self.head = copy.deepcopy(unet, shared), head  # a twin: the plain UNet is to have no hooks
        self.taps = Taps(self.unet).__enter__()

    def forward(self, latents, timestep, context, queries, query_valid):
        output = self.unet(latents, timestep, context, return_dict=False)[0]
        return output, self.head(self.taps.features(), queries, query_valid)


class PlainUNet(nn.Module):
    """The UNet, with only the arguments that matter."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents, timestep, context):
        return self.unet(latents, timestep, context, return_dict=False)[0]


class Decode(nn.Module):
    """The autoencoder's decoder, without the scaling, which is the pipeline's."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents, return_dict=False)[0]


class Switch(nn.Module):
    """In the place of the pipeline's UNet: the grounded form at the captured call, the plain one at all others."""

    def __init__(self, unet: nn.Module, plain: Part, grounded: Part, capture: int):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.parts, self.capture = SimpleNamespace(plain=plain, grounded=grounded), capture

    def start(self, queries: torch.Tensor) -> None:
        """Begin a batch with its object queries [B,O,D]."""
        self.calls, self.queries, self.mask_logits = 0, queries, None
        self.valid = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)

    def forward(self, sample, timestep, encoder_hidden_states, **_unused):
        timestep = timestep.to(torch.float32).expand(len(sample))
        if self.calls == self.capture:
            output, self.mask_logits = self.parts.grounded(
                sample, timestep, encoder_hidden_states, self.queries, self.valid
            )
        else:
            output = self.parts.plain(sample, timestep, encoder_hidden_states)
        self.calls += 1
        return (output,)


class Peer:
    """diffusers' pipeline over a checkpoint. `eager` as it stands; subclasses replace its parts.

    Args:
        checkpoint: the torch model.
        options: sampler, steps, guidance.
        capture: index of the UNet call at which the head reads.
        batch: images to a call.
        device: "cpu", in FP32, or "cuda", in FP16.

    Raises:
        UsageError: settings that diffusers' own pipeline cannot be given.
    """

    name = "eager"

    def __init__(self, checkpoint: Checkpoint, options: Options, capture: int, batch: int, device: str = "cpu"):
        if options.sampler not in SCHEDULERS or options.guidance_scale == 1 or options.guidance_interval != EVERY_STEP:
            raise UsageError(f"peers sample with {', '.join(SCHEDULERS)} and guidance at every step, not as asked")
        if options.threshold != 0.5 or options.size is not None:
            raise UsageError("peers make images of the model's own size and masks at threshold 0.5, not as asked")
        self.checkpoint, self.options, self.batch, self.device = checkpoint, options, batch, device
        self.dtype = torch.float16 if device == "cuda" else torch.float32
        self.pipeline = reference_pipeline(checkpoint)
        unet, vae, head = checkpoint.unet, checkpoint.vae, checkpoint.head
        if device == "cuda":
            unet, vae, text = (
                copy.deepcopy(module).to(device, self.dtype) for module in (unet, vae, checkpoint.text_encoder)
            )
            head = copy.deepcopy(head).to(device)  # reads float32 features, as the released program does
            self.pipeline.text_encoder = text
        plain, grounded, decode = self.prepare(PlainUNet(unet), PlainGrounding(unet, head), Decode(vae))
        self.pipeline.unet = Switch(unet, plain, grounded, capture)
        self.pipeline.scheduler = make_scheduler(checkpoint, options.sampler)
        self.pipeline.vae = copy.copy(vae)  # its weights are shared, its decode is not
        self.pipeline.vae.decode = lambda latents, **_: (decode(latents),)
        self.pipeline.set_progress_bar_config(disable=True)
        self._queries: dict[str, torch.Tensor] = {}

    def prepare(self, plain: nn.Module, grounded: nn.Module, decode: nn.Module) -> tuple[Part, Part, Part]:
        """The three parts in the form in which they are run."""
        return plain, grounded, decode

    @torch.no_grad()
    def queries(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Object queries [B,O,D]; a name is encoded once."""
        names = [name for name in dict.fromkeys(n for p in prompts for n in p.objects) if name not in self._queries]
        if names:
            self._queries |= zip(names, object_queries(self.checkpoint, names), strict=True)
        return torch.stack([torch.stack([self._queries[name] for name in p.objects]) for p in prompts]).to(self.device)

    def run(self, work: Work) -> Output:
        """Make the images and masks of a round, batch by batch."""
        starts = range(0, len(work.prompts), self.batch)
        parts = [self._batch(work.prompts[i : i + self.batch], work.noise[i : i + self.batch]) for i in starts]
        return Output(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _batch(self, prompts: Sequence[Prompt], noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = (side * self.checkpoint.vae_scale_factor for side in noise.shape[2:])
        self.pipeline.unet.start(self.queries(prompts))
        pixels = self.pipeline(
            [prompt.text for prompt in prompts],
            height=height,
            width=width,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            latents=torch.from_numpy(noise).to(self.device, self.dtype),
            output_type="np",
        ).images
        masks = upsample_logits(self.pipeline.unet.mask_logits.float(), (height, width)) > 0
        return np.round(pixels * 255).astype(np.uint8), masks.cpu().numpy()


class CompiledPeer(Peer):
    """torch.compile of the three parts; the first batch of a size pays for it."""

    name = "compile"

    def prepare(self, plain, grounded, decode):
        plain, compiled, decode = (torch.compile(part) for part in (plain, grounded, decode))
        ran = []

        def run(*inputs):
            if not ran:  # what the hooks keep belongs to what is traced: empty at first, it would be traced twice
                grounded(*inputs)
                ran.append(True)
            return compiled(*inputs)

        return plain, run, decode


class OnnxPeer(Peer):
    """The three parts as ONNX Runtime sessions; the text encoder stays in torch.

    Args:
        folder: where the exported graphs are kept; those that are there are used.
        objects, size: O and (h, w) that they are exported for.
        threads: of the sessions; 0 is ONNX Runtime's own choice, all cores.

    Raises:
        BackendError: ONNX Runtime has no provider for the device.
    """

    name = "onnxruntime"

    def __init__(self, *args, folder: Path, objects: int, size: tuple[int, int], threads: int = 0, **kwargs):
        self.folder, self.objects, self.size, self.threads = folder, objects, size, threads
        super().__init__(*args, **kwargs)

    def prepare(self, plain, grounded, decode):
        batch, (height, width), text = self.batch, self.size, self.checkpoint.text_encoder.config
        channels = self.checkpoint.unet.config.in_channels
        tensor = lambda *shape: torch.randn(shape, device=self.device, dtype=self.dtype)
        unet = dict(
            latents=tensor(2 * batch, channels, height, width),
            timestep=torch.ones(2 * batch, device=self.device),
            context=tensor(2 * batch, text.max_position_embeddings, text.hidden_size),
        )
        queries = dict(
            queries=tensor(batch, self.objects, text.hidden_size).float(),
            query_valid=torch.ones(batch, self.objects, dtype=torch.bool, device=self.device),
        )
        latents = dict(latents=tensor(batch, channels, height, width))
        given = dict(plain=(plain, unet), grounded=(grounded, unet | queries), decode=(decode, latents))
        return tuple(self._session(name, module, inputs) for name, (module, inputs) in given.items())

    def _session(self, name: str, module: nn.Module, inputs: dict[str, torch.Tensor]) -> Part:
        """A module's ONNX session as a function of tensors."""
        import onnxruntime

        from grounded_diffusion.export.graphs import quiet

        path = self.folder / f"{name}.onnx"
        if not path.is_file():
            with torch.no_grad(), quiet():
                torch.onnx.export(module.eval(), kwargs=inputs, dynamo=True, verbose=False).save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] if self.device == "cuda" else ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        if session.get_providers()[0] != providers[0]:  # it falls back by itself
            raise BackendError(f"this onnxruntime cannot open {providers[0]}")
        names = [value.name for value in session.get_inputs()]

        def run(*tensors: torch.Tensor) -> Any:
            given = {n: t.contiguous().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
            outputs = [torch.from_numpy(array).to(self.device) for array in session.run(None, given)]
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

        return run


KINDS = {kind.name: kind for kind in (Peer, CompiledPeer, OnnxPeer)}


def make_scheduler(checkpoint: Checkpoint, sampler: str) -> Any:
    """diffusers' scheduler of one of our samplers, on the checkpoint's noise levels."""
    config = dict(checkpoint.scheduler.config) | {"skip_prk_steps": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may name options that another scheduler reads
        return getattr(diffusers, SCHEDULERS[sampler]).from_config(config)


def fastest_batch(checkpoint: Path, shape: tuple[int, ...], tries: Sequence[int], device: str, threads: int) -> int:
    """Of some batch sizes the one at which eager torch's guided UNet calls give the most images a second.

    The peers are to run at their best, as the engine is.
    """
    torch.set_num_threads(threads)
    model = load_checkpoint(checkpoint)
    text, dtype = model.text_encoder.config, torch.float16 if device == "cuda" else torch.float32
    unet, rates = model.unet.to(device, dtype), {}
    for batch in tries:
        latents = torch.randn(2 * batch, *shape, device=device, dtype=dtype)
        context = torch.randn(2 * batch, text.max_position_embeddings, text.hidden_size, device=device, dtype=dtype)
        timestep = torch.ones(2 * batch, device=device)

        @torch.no_grad()
        def call(latents=latents, timestep=timestep, context=context) -> None:
            unet(latents, timestep, context, return_dict=False)[0].sum().item()  # waits for a GPU, too

        rates[batch] = batch / min(repeat(call, 3).seconds)
    return max(rates, key=rates.get)
