"""Prompts in, images with masks out."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np

from grounded_diffusion.bundle import Bundle, open_bundle
from grounded_diffusion.engine.backends.calibrate import CALIBRATED, calibrate, remembered
from grounded_diffusion.engine.backends.open import DEFAULT_BACKEND, open_backend
from grounded_diffusion.engine.pipeline.job import Failed, Job, chunks, list_jobs
from grounded_diffusion.engine.pipeline.shipped import shipped_bundle
from grounded_diffusion.engine.pipeline.text_encoder import TextEncoder
from grounded_diffusion.engine.pipeline.tokenizer import Tokenizer
from grounded_diffusion.engine.prompts.prompt import Prompt, as_prompts
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult, Conditioning
from grounded_diffusion.engine.sampling.guidance import guidance_row
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.sample import ObjectMask, Sample
from grounded_diffusion.engine.sampling.schedule import Schedule, build_schedule
from grounded_diffusion.errors import NumericsError, UsageError


class GroundedPipeline:
    """A model ready to run.

        with GroundedPipeline.open("bundle") as pipe:
            for sample in pipe.generate(["a photograph of a [dog] and a [cat]"], steps=25, seed=7):
                sample.image, sample.masks["dog"]

    Attributes:
        bundle: the opened bundle.
        backend: what runs its graphs.
    """

    def __init__(self, bundle: Bundle, backend: Backend):
        self.bundle, self.backend = bundle, backend
        self.tokenizer = Tokenizer(bundle)
        self.text_encoder = TextEncoder(backend, self.tokenizer)
        self._with_lanes: Callable[[int], Backend] | None = None  # opens the backend anew, where that is ours to choose
        self._threads: int | None = None
        self._generating = 0

    @classmethod
    def open(
        cls,
        bundle: str | Path | None = None,
        *,
        backend: str = "onnxruntime",
        threads: int | None = None,
        lanes: int | None = None,
    ) -> GroundedPipeline:
        """Open a bundle.

        Args:
            bundle: directory that gd-export wrote; None takes the model that ships with the package, exported into
                the user's cache at first use (which needs the `export` extra).
            backend: one of backends.open.BACKENDS: for the CPU "onnxruntime", "openvino", or in the chip's own
                precision "openvino-bf16"; for an NVIDIA GPU "cuda", "tensorrt" or "tensorrt-rtx".
            threads: CPU threads; None takes all cores.
            lanes: batches at once on the CPU, each on its share of the threads: slower for one, faster for many. None
                has `generate` take what is fastest on this machine, with the batch: as measured before, or measured
                at the first call for 256 images, which takes half a minute.

        Raises:
            BundleError: not a bundle, damaged, or of another version.
            UsageError: there is no such backend.
            BackendError: the backend is not installed, or finds no GPU.
        """
        opened = open_bundle(shipped_bundle() if bundle is None else bundle)
        pipe = cls(opened, open_backend(backend, opened, threads=threads, lanes=lanes or 1))
        if lanes is None and backend == DEFAULT_BACKEND:  # of others, the batch may show in the last bits
            pipe._with_lanes = lambda number: open_backend(backend, opened, threads=threads, lanes=number)
            pipe._threads = threads
        return pipe

    def close(self) -> None:
        """Wait for what is under way and free the backend's threads and memory; a with statement does it too."""
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def schedule(self, options: Options) -> Schedule:
        """The sampler's table for this model. Raises UsageError for what the model's scheduler does not allow."""
        own = options.of_model(self.bundle.manifest)
        return build_schedule(self.bundle.manifest.scheduler, cast(str, own.sampler), cast(int, own.steps))

    def latent_shape(self, options: Options) -> tuple[int, int, int]:
        """(channels, h, w) of one latent. Raises UsageError for a size the model cannot make."""
        manifest = self.bundle.manifest
        height, width = options.image_size(manifest)
        return manifest.latent_channels, height // manifest.vae_scale_factor, width // manifest.vae_scale_factor

    def generate(
        self,
        prompts: str | Prompt | Iterable[str | Prompt],
        options: Options | None = None,
        *,
        skip: Container[int] = (),
        noise: np.ndarray | None = None,
        **changes: Any,
    ) -> Iterator[Sample]:
        """Make images with masks, in order. Everything is checked before this returns; the work is done as you iterate.

        Args:
            prompts: bracketed strings ("a photograph of a [dog]"), JSON lines or Prompt objects.
            options: the options; fields of Options may also be given by name, as in `steps=25`.
            skip: indices of images not to make.
            noise: standard normal [n,4,h,w] to start from, a row for each image of the run; None draws it.

        Raises:
            UsageError: a prompt or an option that cannot be used.
            BackendError, NumericsError: while iterating.
        """
        options = replace(options or Options(), **changes).of_model(self.bundle.manifest)
        jobs = list_jobs(as_prompts(prompts), options)
        self.schedule(options)  # raises for what the model's scheduler does not allow
        shape = self.latent_shape(options)
        if noise is not None and noise.shape != (len(jobs), *shape):
            raise UsageError(f"noise must have shape {[len(jobs), *shape]} for these prompts, not {list(noise.shape)}")
        for prompt in dict.fromkeys(job.prompt for job in jobs):
            for text in (prompt.text, prompt.negative_prompt or options.negative_prompt or ""):
                if cut := self.tokenizer.what_is_cut(text):
                    warnings.warn(cut, stacklevel=2)
            for name in prompt.objects:
                self.tokenizer.encode_query(name)  # raises for a name without tokens
        jobs = [job for job in jobs if job.index not in skip]
        return self._generate(jobs, options, noise)

    def _generate(self, jobs: list[Job], options: Options, noise: np.ndarray | None) -> Iterator[Sample]:
        self._generating += 1
        try:
            options = self._at_best(options, len(jobs))
            for results in self.batches(chunks(jobs, self.batch_size(options)), options, noise=noise):
                for result in results:
                    if isinstance(result, Failed):
                        raise NumericsError(result.reason)
                    yield result
        finally:
            self._generating -= 1

    def _at_best(self, options: Options, images: int) -> Options:
        """The options with the batch that is fastest here, and the backend with its lanes where it is idle."""
        if self._with_lanes is None:
            return options
        found = remembered(self.bundle, options, self._threads)
        if found is None and images >= CALIBRATED:
            found = calibrate(self.bundle, options, self._threads)
        if found is None:
            return options
        if self._generating == 1 and images >= found.batch * found.lanes and found.lanes > self.backend.lanes:
            self.backend.close()
            self.backend = self.text_encoder.backend = self._with_lanes(found.lanes)
        return replace(options, batch=found.batch)

    def batch_size(self, options: Options) -> int:
        """Images to a batch: what was asked for, or what the backend is best at, as far as its memory holds it."""
        if options.batch:
            return options.batch
        _, height, width = self.latent_shape(options)
        batch, size = self.backend.default_batch(height * width), options.image_size(self.bundle.manifest)
        while batch > 1 and (need := self.backend.memory(batch, size)) and not need.fits:
            batch //= 2
        return batch

    def batches(
        self, batches: Iterable[Sequence[Job]], options: Options, *, noise: np.ndarray | None = None
    ) -> Generator[list[Sample | Failed], None, None]:
        """Make batches of images, several at once: a result for every job, in order.

        `batches` is read ahead by as many batches as the backend runs at once. A batch in which a number is not
        finite is made again sample by sample; what still fails comes back as Failed.

        Args:
            noise: standard normal [n,4,h,w], rows by the jobs' indices; None draws each job's own.

        Raises:
            BackendError: the backend has failed.
        """
        options = options.of_model(self.bundle.manifest)
        schedule = self.schedule(options)
        submitted: deque[tuple[Sequence[Job], BatchRequest, Future[BatchResult]]] = deque()
        try:
            for jobs in batches:
                request = self._request(jobs, schedule, options, noise)
                submitted.append((jobs, request, self.backend.submit(request)))
                if len(submitted) > self.backend.lanes:
                    yield self._results(*submitted.popleft())
            while submitted:
                yield self._results(*submitted.popleft())
        finally:
            left = [future for _, _, future in submitted]
            for future in left:
                future.cancel()
            wait(left)

    def _request(
        self, jobs: Sequence[Job], schedule: Schedule, options: Options, noise: np.ndarray | None
    ) -> BatchRequest:
        """What the backend is to make for some jobs."""
        shape = self.latent_shape(options)
        keys = [(job.seed, job.draw) for job in jobs]
        return BatchRequest(
            schedule,
            self.condition([job.prompt for job in jobs], options.negative_prompt, cast(float, options.guidance_scale)),
            batch_normal(keys, shape) if noise is None else noise[[job.index for job in jobs]].astype(np.float32),
            size=options.image_size(self.bundle.manifest),
            guidance_scale=1.0 if self.bundle.manifest.guidance_embedding else cast(float, options.guidance_scale),
            guidance_interval=cast(tuple[float, float], options.guidance_interval),
            capture=schedule.capture_index(self.bundle.manifest.capture_timestep),
            step_noise=lambda row: batch_normal(keys, shape, row + 1),
            names=[f"sample {job.index}" for job in jobs],
            threshold=options.threshold,
        )

    def _results(
        self, jobs: Sequence[Job], request: BatchRequest, future: Future[BatchResult]
    ) -> list[Sample | Failed]:
        """The samples of a batch; where it fails, those of each of its images alone."""
        try:
            result = future.result()
        except NumericsError as error:
            if len(jobs) == 1:
                return [Failed(jobs[0], str(error))]
        else:
            return [make_sample(job, b, result) for b, job in enumerate(jobs)]
        alone = [([job], request.part(b, b + 1)) for b, job in enumerate(jobs)]
        futures = [self.backend.submit(part) for _, part in alone]
        return [self._results(*given, future)[0] for given, future in zip(alone, futures, strict=True)]

    def condition(
        self, prompts: list[Prompt], negative_prompt: str | None = None, guidance_scale: float = 1.0
    ) -> Conditioning:
        """Encode the prompts and object queries of a batch.

        Args:
            negative_prompt: of prompts that have none.
            guidance_scale: what a model is told that has it as an input.
        """
        conditional = self.text_encoder.contexts(prompt.text for prompt in prompts)  # [B,L,D]
        own = (prompt.negative_prompt for prompt in prompts)
        unconditional = self.text_encoder.contexts((negative_prompt or "") if text is None else text for text in own)
        queries, valid = self.text_encoder.queries([prompt.objects for prompt in prompts])
        context, manifest = np.concatenate([unconditional, conditional]), self.bundle.manifest
        if width := manifest.guidance_embedding:
            row = guidance_row(guidance_scale, width, manifest.context_dim)
            context = np.concatenate([context, np.broadcast_to(row, (len(context), 1, len(row)))], 1)
        return Conditioning(context, queries, valid)


def make_sample(job: Job, b: int, made: BatchResult) -> Sample:
    """Row b of a batch as a Sample."""
    found, denoised = made.masks, made.denoised
    objects = tuple(
        ObjectMask(
            name,
            label=o + 1,
            area=int(found.area[b, o]),
            box=tuple(found.box[b, o].tolist()),
            score=float(found.score[b, o]),
            read_mask=partial(found.masks.__getitem__, (b, o)),
            presence=None if denoised.presence is None else float(denoised.presence[b, o]),
        )
        for o, name in enumerate(job.prompt.objects)
    )
    return Sample(
        index=job.index,
        prompt=job.prompt.text,
        objects=objects,
        seed=job.seed,
        draw=job.draw,
        image=made.images[b],
        labels=found.labels[b],
        capture_timestep=denoised.capture_timestep,
        mask_logits=denoised.mask_logits[b, : len(objects)],
        latents=denoised.latents[b],
        captured_latents=denoised.captured[b],
    )
