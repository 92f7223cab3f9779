"""What a user would run instead, with the same model, prompts, noise, solver, steps and guidance.

- `eager`: diffusers' pipeline; at the captured step the UNet's full features are concatenated and go through the plain
  head, as the released program does it.
- `compile`: the same, with UNet, head and decoder through torch.compile.

Those whose parts are exported first are in `peers_onnx`. Each runs in the precision it is asked for, and torch in the
memory layout that is faster there. All are spared what the engine is spared: object queries are encoded beforehand, and
the head runs at one step only.
"""

from __future__ import annotations

import copy
import queue
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from torch import nn

from grounded_diffusion.bench.timing import repeat
from grounded_diffusion.bench.work import EVERY_STEP, Output, PeerForm, Work
from grounded_diffusion.engine import Options, Prompt
from grounded_diffusion.errors import UsageError
from grounded_diffusion.export.reference import reference_pipeline
from grounded_diffusion.training.checkpoint import Checkpoint
from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.generator.text import object_queries
from grounded_diffusion.training.head.attention import AttentionHead
from grounded_diffusion.training.head.head import GroundingHead, upsample_logits

SCHEDULERS = {  # the engine's samplers that draw no noise of their own, by diffusers' names
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}
TOKENS = 77  # of a prompt
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Part = Callable[..., Any]


def put(module: nn.Module, precision: str, form: PeerForm, device: str) -> nn.Module:
    """A copy of a module as a peer runs it."""
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    return copy.deepcopy(module).to(device, DTYPES[precision], memory_format=layout)


class PlainGrounding(nn.Module):
    """A UNet and the plain head on its features: latents, timestep, context, queries, query_valid -> output, logits."""

    def __init__(self, unet: nn.Module, head: GroundingHead | AttentionHead):
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
        self.unet, self.head = copy.deepcopy(unet, shared), head  # a twin: the plain UNet is to have no hooks
        self.taps = head.taps(self.unet).__enter__()

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
        precision: "fp32", "bf16" or "fp16"; weights and images are cast to it.
        form: batch and layout.
        device: "cpu" or "cuda".

    Raises:
        UsageError: settings that diffusers' own pipeline cannot be given.
    """

    kind = "eager"
    lanes = 1  # batches at once

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        capture: int,
        precision: str,
        form: PeerForm,
        device: str = "cpu",
    ):
        if options.sampler not in SCHEDULERS or options.guidance_scale == 1 or options.guidance_interval != EVERY_STEP:
            raise UsageError(f"peers sample with {', '.join(SCHEDULERS)} and guidance at every step, not as asked")
        if options.threshold != 0.5 or options.size is not None:
            raise UsageError("peers make images of the model's own size and masks at threshold 0.5, not as asked")
        if checkpoint.text_encoder_2 is not None or checkpoint.denoiser.told:
            raise UsageError(f"peers are of models such as Stable Diffusion 1.x and 2.x, not of {checkpoint.family}")
        self.checkpoint, self.options, self.form, self.device = checkpoint, options, form, device
        self.name, self.dtype = f"{self.kind} {precision}", DTYPES[precision]
        given = checkpoint.unet, checkpoint.vae, checkpoint.text_encoder
        unet, vae, self.text = (put(module, precision, form, device) for module in given)
        head = copy.deepcopy(checkpoint.head).to(device)  # reads float32 features, as the released program does
        parts = self.prepare(PlainUNet(unet), PlainGrounding(unet, head), Decode(vae))
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.lanes):
            self._free.put(self._pipeline(unet, vae, capture, *parts))
        self._queries: dict[str, torch.Tensor] = {}

    def _pipeline(self, unet: nn.Module, vae: nn.Module, capture: int, plain: Part, grounded: Part, decode: Part):
        """diffusers' pipeline with the parts in their places."""
        pipeline = reference_pipeline(self.checkpoint)
        pipeline.text_encoder = self.text
        pipeline.unet = Switch(unet, plain, grounded, capture)
        pipeline.scheduler = make_scheduler(self.checkpoint, self.options.sampler)
        pipeline.vae = copy.copy(vae)  # its weights are shared, its decode is not
        pipeline.vae.decode = lambda latents, **_: (decode(latents),)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def prepare(self, plain: nn.Module, grounded: nn.Module, decode: nn.Module) -> tuple[Part, Part, Part]:
        """The three parts in the form in which they are run."""
        return plain, grounded, decode

    @torch.no_grad()
    def queries(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Object queries [B,O,D]; a name is encoded once."""
        names = [name for name in dict.fromkeys(n for p in prompts for n in p.objects) if name not in self._queries]
        if names:
            model = self.checkpoint
            queries = object_queries(model.tower, model.tokenizer, model.query_template, names)
            self._queries |= zip(names, queries, strict=True)
        return torch.stack([torch.stack([self._queries[name] for name in p.objects]) for p in prompts]).to(self.device)

    def run(self, work: Work) -> Output:
        """Make the images and masks of a round, batch by batch, as many at once as there are lanes."""
        batch = self.form.batch
        cuts = [slice(start, start + batch) for start in range(0, len(work.prompts), batch)]
        make = lambda cut: self._batch(work.prompts[cut], work.noise[cut])
        if self.lanes == 1:
            parts = [make(cut) for cut in cuts]
        else:
            with ThreadPoolExecutor(self.lanes) as pool:
                parts = list(pool.map(make, cuts))
        return Output(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _batch(self, prompts: Sequence[Prompt], noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = (side * self.checkpoint.vae_scale_factor for side in noise.shape[2:])
        pipeline = self._free.get()
        pipeline.unet.start(self.queries(prompts))
        pixels = pipeline(
            [prompt.text for prompt in prompts],
            height=height,
            width=width,
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance_scale,
            latents=torch.from_numpy(noise).to(self.device, self.dtype),
            output_type="np",
        ).images
        masks = upsample_logits(pipeline.unet.mask_logits.float(), (height, width)) > 0
        self._free.put(pipeline)
        return np.round(pixels * 255).astype(np.uint8), masks.cpu().numpy()


class CompiledPeer(Peer):
    """torch.compile of the three parts; the first batch of a size pays for it."""

    kind = "compile"

    def prepare(self, plain, grounded, decode):
        plain, compiled, decode = (torch.compile(part) for part in (plain, grounded, decode))
        ran = []

        def run(*inputs):
            if not ran:  # what the hooks keep belongs to what is traced: empty at first, it would be traced twice
                grounded(*inputs)
                ran.append(True)
            return compiled(*inputs)

        return plain, run, decode


def make_scheduler(checkpoint: Checkpoint, sampler: str) -> Any:
    """diffusers' scheduler of one of our samplers, on the checkpoint's noise levels."""
    config = dict(checkpoint.scheduler.config) | {"skip_prk_steps": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may name options that another scheduler reads
        return getattr(diffusers, SCHEDULERS[sampler]).from_config(config)


def fastest_form(
    checkpoint: Path, shape: tuple[int, ...], precision: str, tries: Sequence[int], device: str, threads: int
) -> PeerForm:
    """Of some batch sizes and both layouts those at which eager torch's guided UNet calls are fastest, image for image.

    The peers are to run at their best, as the engine is.
    """
    torch.set_num_threads(threads)
    unet, rates, dtype = load_base(checkpoint)["unet"], {}, DTYPES[precision]
    for channels_last in (True, False):
        copied = put(unet, precision, PeerForm(0, channels_last), device)
        for batch in tries:
            latents = torch.randn(2 * batch, *shape, device=device, dtype=dtype)
            context = torch.randn(2 * batch, TOKENS, unet.config.cross_attention_dim, device=device, dtype=dtype)
            timestep = torch.ones(2 * batch, device=device)

            @torch.no_grad()
            def call(unet=copied, latents=latents, timestep=timestep, context=context) -> None:
                unet(latents, timestep, context, return_dict=False)[0].sum().item()  # waits for a GPU, too

            rates[PeerForm(batch, channels_last)] = batch / min(repeat(call, 2).seconds)
    return max(rates, key=rates.get)
