"""The denoising loop on a device: all work is queued on streams, and the host waits only for finished batches.

    loop stream    upload, context, UNet, step, UNet, ..., hand over | upload, context, UNet, ...      (the next batch)
    decode stream                                                    | VAE, image and mask epilogues
    copy stream                                                      |                               results to the host

It is `denoise` with the pipeline's epilogues, operation for operation. A step is captured once and replayed: what
differs between steps, coefficients and timesteps, lies in one record that is copied to a fixed place before each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grounded_diffusion.bundle import CONTEXT, PRESENCE, UNET, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.engine.backends.gpu.device import ALIGNMENT, Device, Graphs, Tensor
from grounded_diffusion.engine.backends.gpu.memory import BYTE, F32, Memory, Sizes, Slot, Streams, conditional
from grounded_diffusion.engine.backends.gpu.results import MASKS, PIXELS, first_failure, unpack
from grounded_diffusion.engine.sampling.batch import BatchRequest, BatchResult, Step, decode_starts
from grounded_diffusion.errors import NumericsError
from grounded_diffusion.kernels.cuda.launch import MaskPointers, StepPointers, pack_step

REMEMBERED = 4  # whole loops kept captured

Replay = Literal["none", "step", "loop"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a call is: calls of the same kind replay the same captured work."""

    grounded: bool
    both: bool  # the network runs both halves of guidance


class QueuedBatch:
    """A batch on its way through the streams, and its slot's memory until the result is copied out."""

    def __init__(self, device: Device, slot: Slot, request: BatchRequest):
        self._device, self._slot, self._request = device, slot, request
        self._lock = threading.Lock()
        self._outcome: BatchResult | NumericsError | None = None  # once it is there, the slot is another batch's

    def wait(self) -> BatchResult | NumericsError:
        """Stop until the batch is made, and copy it out of the slot."""
        with self._lock:
            if self._outcome is None:
                self._device.activate()
                self._device.sync(self._slot.done)
                arrays = self._slot.arrays
                self._outcome = first_failure(self._request, arrays["flags"]) or unpack(self._request, arrays)
            return self._outcome

    def result(self) -> BatchResult:
        """The batch. Raises NumericsError naming stage, step and sample."""
        outcome = self.wait()
        if isinstance(outcome, NumericsError):
            raise outcome
        return outcome


class DeviceLoop:
    """One bucket of sizes: its buffers, its bound graphs and its captured work. Called by one thread.

    Args:
        replay: what is captured and replayed: nothing, single steps, or the whole loop.

    Raises:
        DeviceMemoryError: it does not fit.
        BackendError: the graphs cannot be had, or do not fit together.
    """

    def __init__(self, device: Device, graphs: Graphs, sizes: Sizes, streams: Streams, replay: Replay = "step"):
        self.device, self.graphs, self.sizes, self.streams = device, graphs, sizes, streams
        self.replay = replay
        try:
            self.memory = Memory(device, graphs, sizes, streams)
        except BaseException:
            graphs.close()
            raise
        self.at, self.slots = self.memory.at, self.memory.slots
        self._told = [PRESENCE] if PRESENCE in self.at else []
        self._bound: dict[tuple[bool, bool] | str, Callable[[], None]] = {}
        self._captured: dict[Any, Callable[[], None]] = {}
        self._queued: list[QueuedBatch | None] = [None] * len(self.slots)  # the last one of each slot
        self._next = 0
        try:
            for kind in (Kind(True, True), Kind(False, True)):  # the largest first: others share its memory
                self._network(kind)
            tensors = {name: self.at[name] for name in ("context", *self.memory.made)}
            self._bound[CONTEXT] = graphs.bind(CONTEXT, tensors, streams.loop)
            tensors = {"latents": self.at["decode"], "image": self.at["image"]}
            self._bound[VAE_DECODER] = graphs.bind(VAE_DECODER, tensors, streams.decode)
        except BaseException:
            self.close()
            raise

    def _network(self, kind: Kind) -> Callable[[], None]:
        """One run of the network that a call needs."""
        graph, key = (UNET_GROUNDED if kind.grounded else UNET), (kind.grounded, kind.both)
        if key not in self._bound:
            at, batch = self.at, self.sizes.batch
            tensors = {
                "latents": at["input"],  # both halves see them
                "timestep": Tensor(at["record"].pointer + ALIGNMENT, (batch,), self.memory.timestep),
                "model_output": at["model_output"].rows(2 * batch if kind.both else batch),
                **{name: at[name if kind.both else conditional(name)] for name in self.memory.made},
            }
            if kind.grounded:
                tensors |= {name: at[name] for name in ("queries", "query_valid", "mask_logits", *self._told)}
            self._bound[key] = self.graphs.bind(graph, tensors, self.streams.loop)
        return self._bound[key]

    def _step(self, kind: Kind) -> None:
        """The network, then the kernel that turns its output into the next input."""
        at, b = self.at, self.sizes.batch
        if kind.grounded:
            kept = at["captured"]
            self.device.copy(self.streams.loop, kept.pointer, at["input"].pointer, kept.nbytes)
        self._network(kind)()
        latents = at["latents"].pointer
        pointers = StepPointers(
            coefficients=at["record"].pointer,
            model_output=at["model_output"].pointer,
            latents=latents,
            out_latents=latents,
            out_input=at["input"].pointer,
            history=at["history"].pointer,
            noise=at["noise"].pointer,
            bad=at["flags"].pointer,
        )
        self.device.kernels.cfg_step(
            self.streams.loop,
            pointers,
            count=at["latents"].nbytes // F32.itemsize,
            guided=kind.both,
            half=self.memory.half,
            batch=b,
        )

    def _replayed(self, key: Any, work: Callable[[], None]) -> Callable[[], None]:
        """`work`, captured now if it was not."""
        if key not in self._captured:
            whole = [k for k in self._captured if isinstance(k, tuple)]
            if len(whole) >= REMEMBERED:
                del self._captured[whole[0]]
            self._captured[key] = self.device.capture(self.streams.loop, work)
        return self._captured[key]

    def _steps(self, slot: Slot, request: BatchRequest, kinds: tuple[Kind, ...], replay: bool) -> None:
        """All steps of a schedule, each of them replayed or queued as it is."""
        copy, stream, at = self.device.copy, self.streams.loop, self.at
        records, size = at["records"], at["record"].nbytes
        drawn = 0
        for i, (row, kind) in enumerate(zip(request.schedule.rows, kinds, strict=True)):
            if row.n:
                source = slot.noise.ctypes.data + drawn * at["noise"].nbytes
                copy(stream, at["noise"].pointer, source, at["noise"].nbytes)
                drawn += 1
            copy(stream, at["record"].pointer, records.pointer + i * size, size)
            if replay:
                self._replayed(kind, lambda kind=kind: self._step(kind))()
            else:
                self._step(kind)

    def enqueue(self, request: BatchRequest) -> QueuedBatch:
        """Queue a batch of at most `sizes.batch` images; stops only while all slots are under way."""
        number, slot = self._next, self.slots[self._next]
        self._next = (self._next + 1) % len(self.slots)
        if before := self._queued[number]:
            before.wait()
        steps = request.steps()
        kinds = tuple(Kind(step.grounded, step.both_halves) for step in steps)
        for kind in dict.fromkeys(kinds):
            self._network(kind)  # binds what is new before anything of this batch is queued
        self._stage(slot, request, steps)
        device, stream, at = self.device, self.streams.loop, self.at
        used = self.memory.upload.offsets["records"] + len(kinds) * at["record"].nbytes
        device.copy(stream, at["latents"].pointer, slot.upload.ctypes.data, used)
        self._bound[CONTEXT]()
        if not all(step.both_halves for step in steps):
            for name in self.memory.made:
                half, batch = at[conditional(name)], self.sizes.batch
                device.copy(stream, half.pointer, at[name].part(batch, batch).pointer, half.nbytes)
        device.clear(stream, at["flags"].pointer, at["flags"].nbytes)
        mode = self.replay if self.graphs.capturable else "none"  # known once all is bound
        if mode == "loop" and not request.schedule.stochastic:
            self._replayed(kinds, lambda: self._steps(slot, request, kinds, replay=False))()
        else:  # the noise of a stochastic sampler comes from the slot's own memory, step by step
            self._steps(slot, request, kinds, replay=mode != "none")
        self._hand_over(slot)
        self._finish(slot, request)
        self._queued[number] = queued = QueuedBatch(device, slot, request)
        return queued

    def _stage(self, slot: Slot, request: BatchRequest, steps: list[Step]) -> None:
        """Write a batch into the slot's pinned memory. What is missing to the bucket repeats the last image."""
        views, given, schedule = slot.views, request.conditioning, request.schedule
        batch, objects = given.query_valid.shape
        fill = np.minimum(np.arange(self.sizes.batch), batch - 1)
        latents = request.noise[fill] * np.float32(schedule.init_noise_sigma)
        views["latents"][:] = latents
        views["input"][:] = latents * np.float32(schedule.rows[0].input_scale)
        views["context"].reshape(2, *views["context"][: self.sizes.batch].shape)[:] = given.context.reshape(
            2, batch, *given.context.shape[1:]
        )[:, fill]
        views["queries"][:], views["query_valid"][:] = 0, False
        views["queries"][:, :objects], views["query_valid"][:, :objects] = given.queries[fill], given.query_valid[fill]
        for i, step in enumerate(steps):
            packed = pack_step(step.update, slots=schedule.history, row=i).view(BYTE)
            record = views["records"][i]
            record[: packed.size] = packed
            record[ALIGNMENT:].view(self.memory.timestep)[:] = step.timestep
        drawn = [request.noise_after(i)[fill] for i, step in enumerate(steps) if step.update.n]
        if drawn:
            noise = np.ascontiguousarray(drawn, F32).view(BYTE).reshape(-1)
            if slot.noise.size < noise.size:
                slot.noise = self.device.pinned(noise.size)
            slot.noise[: noise.size] = noise

    def _hand_over(self, slot: Slot) -> None:
        """Copy what the loop leaves behind to the slot, so that the next batch may begin."""
        device, stream, at = self.device, self.streams.loop, self.at
        final = slot.at["final"]
        source = at["latents"] if final.dtype == F32 else at["input"]  # the last step scales its next input by 1
        device.copy(stream, final.pointer, source.pointer, final.nbytes)
        for name in ("latents", "mask_logits", "captured", "flags", "query_valid", *self._told):
            device.copy(stream, slot.at[name].pointer, at[name].pointer, at[name].nbytes)
        device.record(slot.denoised, stream)

    def _finish(self, slot: Slot, request: BatchRequest) -> None:
        """Turn latents into bytes and masks, and copy them to the host, on their own streams."""
        device, at, s = self.device, slot.at, self.sizes
        stream, flags = self.streams.decode, at["flags"].pointer
        device.wait(stream, slot.denoised)
        for start in decode_starts(s.batch, s.decoded):
            self._decode_part(slot, start)
        outputs = {name: at[name].pointer for name in ("labels", "area", "box", "score", "bits")}
        logits = at["mask_logits"]
        pointers = MaskPointers(
            logits=logits.pointer, valid=at["query_valid"].pointer, stats=self.at["stats"].pointer,
            bad=flags + MASKS * s.batch, **outputs,
        )  # fmt: skip
        device.kernels.mask_epilogue(
            stream, pointers, shape=logits.shape, size=s.image, threshold=request.threshold,
            half=logits.dtype == np.float16,
        )  # fmt: skip
        device.record(slot.decoded, stream)
        device.wait(self.streams.copy, slot.decoded)
        device.copy(self.streams.copy, slot.host.ctypes.data, slot.pointer, self.memory.results.nbytes)
        device.record(slot.done, self.streams.copy)

    def _decode_part(self, slot: Slot, start: int) -> None:
        """Decode as many images as are decoded at once, from image `start` of the batch on, and make bytes of them."""
        at, decode, image, s = slot.at, self.at["decode"], self.at["image"], self.sizes
        stream, pixels = self.streams.decode, at["pixels"].part(start, s.decoded)
        self.device.copy(stream, decode.pointer, at["final"].part(start, s.decoded).pointer, decode.nbytes)
        self._bound[VAE_DECODER]()
        self.device.kernels.image_epilogue(
            stream, image.pointer, pixels.pointer, batch=s.decoded, size=s.image,
            half=image.dtype == np.float16, bad=at["flags"].pointer + PIXELS * s.batch + start,
        )  # fmt: skip

    def close(self) -> None:
        """Wait for what is under way and free the device's memory."""
        for queued in self._queued:
            if queued:
                queued.wait()
        self._captured.clear()
        self._bound.clear()
        self.graphs.close()
        self.memory.free()
        self.slots, self._queued = [], []
