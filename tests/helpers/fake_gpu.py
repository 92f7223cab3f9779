"""A GPU made of host memory, for tests of the device loop.

Its streams run nothing until somebody waits, and then only what must have happened by then: what is not ordered by
the loop's own events has not happened, and stale or poisoned memory shows in the results. A stream may also be eager
and do everything at once, before the others have used what it writes.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from grounded_diffusion.bundle import CONTEXT, GPU, UNET_GROUNDED
from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError
from grounded_diffusion.engine.backends.gpu.needs import counted_memory
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, OnnxRuntimeBackend
from grounded_diffusion.kernels import StepCoefficients, cfg_step, image_epilogue, mask_epilogue, reference
from grounded_diffusion.kernels.cuda.launch import COEFFICIENTS

RUNNING = threading.RLock()  # threads that wait take turns


def view(pointer, shape, dtype):
    """The array at an address."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype).reshape(shape)


class Stream:
    """Work that has not been done yet."""

    def __init__(self):
        self.waiting, self.done, self.recording, self.eager = [], 0, None, False

    def put(self, work):
        (self.waiting if self.recording is None else self.recording).append(work)
        if self.eager and self.recording is None:
            self.run(len(self.waiting))

    def run(self, until):
        with RUNNING:
            while self.done < until:
                work, self.done = self.waiting[self.done], self.done + 1
                work()


class Event:
    def __init__(self):
        self.stream, self.at = None, 0

    def finish(self):
        if self.stream:
            self.stream.run(self.at)


class HostKernels:
    """The launchers of CudaKernels over the host kernels."""

    def cfg_step(self, stream, at, *, count, guided, half, batch):
        def work():
            c = view(at.coefficients, (1,), COEFFICIENTS)[0]
            shape, kind = (batch, count // batch), np.float16 if half else np.float32
            terms, slots = c["terms"], max([c["head"], *c["slot"][: c["terms"]]]) + 1
            past = view(at.history, (slots, *shape), np.float32) if slots else None
            b = np.zeros(slots + 1)  # weights of the values of k steps ago
            b[0] = c["b0"]
            for weight, slot in zip(c["weight"][:terms], c["slot"][:terms], strict=True):
                b[(c["head"] - slot - 1) % slots + 1] = weight
            output = view(at.model_output, ((2 if guided else 1) * batch, shape[1]), kind).astype(np.float32)
            x, to = view(at.latents, shape, np.float32), view(at.out_input, shape, kind)
            step = StepCoefficients(
                guidance_scale=float(c["guidance"]) if guided else None, b=b.tolist(), head=max(0, int(c["head"])),
                **{name: float(c[name]) for name in ("cx", "co", "a", "n", "next_scale")},
            )  # fmt: skip
            noise = view(at.noise, shape, np.float32) if step.n else None
            new, after = view(at.out_latents, shape, np.float32), np.empty(to.shape, np.float32)
            cfg_step(step, output, x, past, noise=noise, out_latents=new, out_input=after)
            to[:] = after
            flags = view(at.bad + int(c["row"]) * batch, (batch,), np.uint8)
            flags[~np.isfinite(new).all(1)] = 1

        stream.put(work)

    def image_epilogue(self, stream, image, out, *, batch, size, half, bad):
        def work():
            pixels = view(image, (batch, 3, *size), np.float16 if half else np.float32)
            image_epilogue(pixels, view(out, (batch, *size, 3), np.uint8))
            view(bad, (batch,), np.uint8)[~np.isfinite(pixels).all((1, 2, 3))] = 1

        stream.put(work)

    def mask_epilogue(self, stream, at, *, shape, size, threshold, half):
        def work():
            low = view(at.logits, shape, np.float16 if half else np.float32).astype(np.float32)
            flags, top = view(at.valid, shape[:2], np.bool_), (*shape[:2],)
            result = mask_epilogue(low, flags, size, threshold)
            view(at.labels, (shape[0], *size), np.uint8)[:] = result.labels
            view(at.area, top, np.int64)[:], view(at.score, top, np.float32)[:] = result.area, result.score
            view(at.box, (*top, 4), np.int32)[:] = result.box
            words = reference.pack_bits(result.masks)
            view(at.bits, words.shape, np.uint32)[:] = words
            view(at.bad, (shape[0],), np.uint8)[~(np.isfinite(low).all((2, 3)) | ~flags).all(1)] = 1

        stream.put(work)


class HostDevice:
    """Host memory as a device. Memory starts as NaN, and what is freed becomes NaN again."""

    name = "host"

    def __init__(self, memory=1 << 40, eager=()):
        self.kernels, self.memory, self.blocks, self.eager = HostKernels(), memory, {}, eager
        self.streams, self.captures, self.replays = [], 0, 0

    @property
    def used(self):
        """Bytes that are allocated."""
        return sum(block.nbytes for block in self.blocks.values())

    def put(self, stream, work):
        """The test's own work on a stream."""
        stream.put(work)

    def activate(self):
        pass

    def allocate(self, nbytes):
        if self.used + nbytes > self.memory:
            raise DeviceMemoryError(f"{nbytes} bytes are too many")
        raw = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        self.blocks[raw.ctypes.data + start] = raw
        return raw.ctypes.data + start

    def free(self, pointer):
        for stream in self.streams:
            stream.run(len(stream.waiting))
        self.blocks.pop(pointer)[:] = 0xFF

    def free_memory(self):
        return self.memory - self.used

    def pinned(self, nbytes):
        return np.full(nbytes, 0xFF, np.uint8)

    def stream(self):
        self.streams.append(Stream())
        self.streams[-1].eager = len(self.streams) - 1 in self.eager
        return self.streams[-1]

    def event(self):
        return Event()

    def record(self, event, stream):
        event.stream, event.at = stream, len(stream.waiting)

    def wait(self, stream, event):
        other, at = event.stream, event.at
        stream.put(lambda: other.run(at))

    def sync(self, event):
        event.finish()

    def copy(self, stream, to, source, nbytes):
        stream.put(lambda: ctypes.memmove(to, source, nbytes))

    def clear(self, stream, pointer, nbytes):
        stream.put(lambda: ctypes.memset(pointer, 0, nbytes))

    def capture(self, stream, work):
        stream.recording, self.captures = [], self.captures + 1
        work()
        recorded, stream.recording = stream.recording, None

        def replay():
            self.replays += 1
            for one in recorded:
                stream.put(one)

        return replay


class HostRuntime:
    """The GPU's graphs by the CPU's ONNX Runtime, on a device's memory: of a HostDevice or of a FakeDriverDevice."""

    name = "host"

    def __init__(self, bundle, device, buckets=None):
        self.bundle, self.device, self.fixed, self.spoil = bundle, device, buckets, None
        self.backend = OnnxRuntimeBackend(bundle, threads=1, variant=GPU)

    def session(self, graph):
        return self.backend._makers()["context"].session if graph == CONTEXT else self.backend.graph(graph).session

    def buckets(self, batch, objects, size):
        return self.fixed and [bucket for bucket in self.fixed if bucket[1] >= objects]

    def run(self, graph, inputs, stream=None):
        session, names = self.session(graph), list(self.bundle.gpu_io(graph)[1])
        given = {value.name: inputs[value.name].astype(DTYPES[value.type]) for value in session.get_inputs()}
        return {n: v.astype(np.float32) for n, v in zip(names, session.run(names, given), strict=True)}

    def memory(self, sizes):
        return counted_memory(self.bundle, GPU, sizes)

    def open(self, sizes, streams):
        return HostGraphs(self, sizes)

    def close(self):
        pass


class HostGraphs:
    capturable = True

    def __init__(self, runtime, sizes):
        self.runtime, self.bundle, self.sizes = runtime, runtime.bundle, sizes

    def dtype(self, graph, tensor):
        session = self.runtime.session(graph)
        types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
        return np.dtype(DTYPES[types[tensor]])

    def mask_size(self):
        s, f32 = self.sizes, np.float32
        inputs = {
            "latents": np.zeros((2, *s.latent), f32), "timestep": np.zeros(2, f32),
            "context": np.zeros((2, s.tokens, s.width), f32), "queries": np.zeros((1, 1, s.width), f32),
            "query_valid": np.ones((1, 1), np.bool_),
        }  # fmt: skip
        return self.runtime.backend.run(UNET_GROUNDED, inputs)["mask_logits"].shape[2:]

    def bind(self, graph, tensors, stream):
        inputs = self.bundle.gpu_io(graph)[0]
        arrays = {name: view(t.pointer, t.shape, t.dtype) for name, t in tensors.items()}

        def work():
            outputs = self.runtime.run(graph, {name: arrays[name] for name in inputs})
            for name, value in outputs.items():
                arrays[name][:] = value
            if self.runtime.spoil:
                self.runtime.spoil(graph, arrays)

        def launch():
            for name, tensor in tensors.items():
                assert tensor.pointer % 256 == 0, f"{name} is not aligned"
            self.runtime.device.put(stream, work)

        return launch

    def close(self):
        pass
