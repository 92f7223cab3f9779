"""Device and host memory of one bucket of sizes: allocated once, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from grounded_diffusion.bundle import CONTEXT, IN_FLOAT, PRESENCE, UNET, UNET_GROUNDED, VAE_DECODER, Bundle
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


def conditional(name: str) -> str:
    """What the conditional half of an array is called where it lies apart, aligned as graphs want their inputs."""
    return f"conditional {name}"


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


def blocks(
    bundle: Bundle, s: Sizes, kind: Callable[[str, str], np.dtype], mask_size: tuple[int, int]
) -> tuple[Block, Block, Block, Block]:
    """What a loop uploads, works in, copies back, and keeps of a batch besides.

    Args:
        kind: type of a graph's input or output.
        mask_size: (h', w') of the mask logits.
    """
    b, latents = s.batch, (s.batch, *s.latent)
    mask = ((b, s.objects, *mask_size), kind(UNET_GROUNDED, "mask_logits"))
    presence = {PRESENCE: ((b, s.objects), kind(UNET_GROUNDED, PRESENCE))} if bundle.tells_presence else {}
    made = {name: [int(n) for n in shape.split(",")[1:]] for name, shape in bundle.gpu_io(CONTEXT)[1].items()}
    decode, captured = kind(VAE_DECODER, "latents"), (latents, kind(UNET, "latents"))
    record = ALIGNMENT + -(-b * kind(UNET, "timestep").itemsize // ALIGNMENT) * ALIGNMENT
    upload = Block({
        "latents": (latents, F32),
        "input": (latents, kind(UNET, "latents")),
        "context": ((2 * b, s.tokens, s.width), kind(CONTEXT, "context")),
        "queries": ((b, s.objects, s.width), kind(UNET_GROUNDED, "queries")),
        "query_valid": ((b, s.objects), np.bool_),
        "records": ((MAX_ROWS, record), BYTE),  # last: only the rows in use are copied
    })  # fmt: skip
    work = Block({
        **{name: ((2 * b, *row), kind(UNET, name)) for name, row in made.items()},
        **{conditional(name): ((b, *row), kind(UNET, name)) for name, row in made.items()},
        "model_output": ((2 * b, *s.latent), kind(UNET, "model_output")),
        "history": ((MAX_TERMS, *latents), F32),
        "noise": (latents, F32),
        "record": ((record,), BYTE),
        "mask_logits": mask,
        "captured": captured,
        "decode": ((s.decoded, *s.latent), decode),
        "image": ((s.decoded, 3, *s.image), kind(VAE_DECODER, "image")),
        "stats": ((b * s.objects * STATS_BYTES,), BYTE),
        "flags": ((FLAG_ROWS, b), BYTE),
        **presence,
    })  # fmt: skip
    results = Block({
        "latents": (latents, F32),
        "mask_logits": mask,
        "captured": captured,
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
    return upload, work, results, own


def loop_bytes(bundle: Bundle, s: Sizes) -> int:
    """Device memory of a loop's own arrays, told from the bundle alone; the head's logits are of the latents' size."""
    wide = bundle.manifest.precision == "fp32"
    kind = lambda graph, name: F32 if wide or name in IN_FLOAT else np.dtype(np.float16)
    upload, work, results, own = blocks(bundle, s, kind, s.latent[1:])
    return upload.nbytes + work.nbytes + SLOTS * (results.nbytes + own.nbytes)


class Memory:
    """Everything a device loop reads and writes.

    Attributes:
        at: the loop's own arrays on the device, by name.
        upload, results: what goes to the device before a batch and comes back after it, each in one copy.
        slots: memory of the batches under way.
        made: names of keys and values of the cross-attention, of both halves; those of the conditional half alone are
            called `conditional(name)`.
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
        self.half = kind(UNET, "latents") == np.float16
        types = {kind(g, name) for g in (UNET, UNET_GROUNDED) for name in ("latents", "model_output")}
        if len(types) > 1 or (decode := kind(VAE_DECODER, "latents")) not in (F32, *types):
            raise BackendError(
                f"latents are {', '.join(sorted(map(str, types)))} in the UNets and {decode} in the decoder; "
                "the device loop needs one type, run gd-export again"
            )
        self.made, self.timestep = tuple(graphs.bundle.gpu_io(CONTEXT)[1]), kind(UNET, "timestep")
        self.upload, work, self.results, own = blocks(graphs.bundle, s, kind, graphs.mask_size())
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
