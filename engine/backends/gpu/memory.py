"""Device and host memory of one bucket of sizes: allocated once, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grounded_diffusion.bundle import PRESENCE, UNET, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.engine.backends.gpu.device import ALIGNMENT, Block, Device, Graphs
from grounded_diffusion.engine.backends.gpu.results import FLAG_ROWS, MAX_ROWS
from grounded_diffusion.engine.sampling.batch import decoded_at_once
from grounded_diffusion.errors import BackendError
from grounded_diffusion.kernels.cuda.launch import MAX_TERMS, STATS_BYTES

SLOTS = 2  # batches under way: one in the loop, one being decoded and copied
F32, BYTE = np.dtype(np.float32), np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of one loop: B images, O objects, latents (c,h,w), L tokens of width D, images (H,W)."""

    batch: int
    objects: int
    latent: tuple[int, int, int]
    tokens: int
    width: int
    image: tuple[int, int]

    @property
    def decoded(self) -> int:
        """Images that the decoder takes at once."""
        return decoded_at_once(self.batch, self.latent[1] * self.latent[2])


@dataclass(frozen=True, slots=True)
class Streams:
    """Where the work goes; `aside` is for what is asked for in between, such as the text encoder."""

    loop: Any
    decode: Any
    copy: Any
    aside: Any

    @classmethod
    def on(cls, device: Device) -> Streams:
        return cls(*(device.stream() for _ in range(4)))


class Slot:
    """Memory of one batch under way, on both sides, and the events of its stages."""

    def __init__(self, device: Device, upload: Block, results: Block, own: Block):
        self.upload = device.pinned(upload.nbytes)
        self.views = upload.views(self.upload)
        self.host = device.pinned(results.nbytes)
        self.arrays = results.views(self.host)
        self.pointer = device.allocate(results.nbytes + own.nbytes)
        self.at = results.tensors(self.pointer) | own.tensors(self.pointer + results.nbytes)
        self.noise = np.empty(0, np.uint8)  # pinned, grown by stochastic samplers
        self.denoised, self.decoded, self.done = (device.event() for _ in range(3))


class Memory:
    """Everything a device loop reads and writes.

    Attributes:
        at: the loop's own arrays on the device, by name.
        upload, results: what goes to the device before a batch and comes back after it, each in one copy.
        slots: memory of the batches under way.
        half: the UNets' latents are float16.
        timestep: type of the UNets' timesteps.

    Raises:
        DeviceMemoryError: it does not fit.
        BackendError: the graphs' types do not fit together.
    """

    def __init__(self, device: Device, graphs: Graphs, sizes: Sizes, streams: Streams):
        self.device = device
        self.slots: list[Slot] = []
        self._pointers: list[int] = []
        try:
            self._allocate(graphs, sizes, streams)
        except BaseException:
            self.free()
            raise

    def _allocate(self, graphs: Graphs, s: Sizes, streams: Streams) -> None:
        kind = graphs.dtype
        b, latents = s.batch, (s.batch, *s.latent)
        both = (2 * b, *s.latent)
        self.half = kind(UNET, "latents") == np.float16
        logits, decode = kind(UNET_GROUNDED, "mask_logits"), kind(VAE_DECODER, "latents")
        types = {kind(g, name) for g in (UNET, UNET_GROUNDED) for name in ("latents", "model_output")}
        if len(types) > 1 or decode not in (F32, *types):
            raise BackendError(
                f"latents are {', '.join(sorted(map(str, types)))} in the UNets and {decode} in the decoder; "
                "the device loop needs one type, run gd-export again"
            )
        mask = ((b, s.objects, *graphs.mask_size()), logits)
        told = PRESENCE in graphs.outputs(UNET_GROUNDED)
        presence = {PRESENCE: ((b, s.objects), kind(UNET_GROUNDED, PRESENCE))} if told else {}
        context = kind(UNET, "context")
        self.timestep = kind(UNET, "timestep")
        record = ALIGNMENT + -(-2 * b * self.timestep.itemsize // ALIGNMENT) * ALIGNMENT
        self.upload = Block({
            "latents": (latents, F32),
            "input": (both, kind(UNET, "latents")),
            "context": ((2 * b, s.tokens, s.width), context),
            "queries": ((b, s.objects, s.width), kind(UNET_GROUNDED, "queries")),
            "query_valid": ((b, s.objects), np.bool_),
            "records": ((MAX_ROWS, record), BYTE),  # last: only the rows in use are copied
        })  # fmt: skip
        work = Block({
            "model_output": (both, kind(UNET, "model_output")),
            "history": ((MAX_TERMS, *latents), F32),
            "noise": (latents, F32),
            "record": ((record,), BYTE),
            "conditional": ((b, s.tokens, s.width), context),
            "mask_logits": mask,
            "captured": (latents, kind(UNET, "latents")),
            "decode": ((s.decoded, *s.latent), decode),
            "image": ((s.decoded, 3, *s.image), kind(VAE_DECODER, "image")),
            "stats": ((b * s.objects * STATS_BYTES,), BYTE),
            "flags": ((FLAG_ROWS, b), BYTE),
            **presence,
        })  # fmt: skip
        self.results = Block({
            "latents": (latents, F32),
            "mask_logits": mask,
            "captured": (latents, kind(UNET, "latents")),
            "flags": ((FLAG_ROWS, b), BYTE),
            "pixels": ((b, *s.image, 3), BYTE),
            "labels": ((b, *s.image), BYTE),
            "bits": ((b, s.objects, s.image[0], -(-s.image[1] // 32)), np.uint32),
            "area": ((b, s.objects), np.int64),
            "box": ((b, s.objects, 4), np.int32),
            "score": ((b, s.objects), F32),
            **presence,
        })  # fmt: skip
        own = Block({"final": (latents, decode), "query_valid": ((b, s.objects), np.bool_)})
        pointer = self.device.allocate(self.upload.nbytes + work.nbytes)
        self._pointers.append(pointer)
        self.device.clear(streams.loop, pointer, self.upload.nbytes + work.nbytes)
        self.at = self.upload.tensors(pointer) | work.tensors(pointer + self.upload.nbytes)
        for _ in range(SLOTS):
            self.slots.append(Slot(self.device, self.upload, self.results, own))
            self._pointers.append(self.slots[-1].pointer)
            self.device.clear(streams.loop, self.slots[-1].pointer, self.results.nbytes + own.nbytes)
        cleared = self.device.event()
        self.device.record(cleared, streams.loop)
        self.device.sync(cleared)  # before another stream touches it

    def free(self) -> None:
        """Give the device's memory back; nothing may be under way."""
        for pointer in self._pointers:
            self.device.free(pointer)
        self._pointers, self.slots = [], []
