"""The device loop, executed on a device made of host memory, gives what the NumPy loop gives.

Streams of that device run nothing until somebody waits, and then only what must have happened by then: what is not
ordered by the loop's own events has not happened, and stale or poisoned memory shows in the results. A stream may
also be eager and do everything at once, before the others have used what it writes.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings

import numpy as np
import pytest

from grounded_diffusion.bundle import GRAPH_IO, UNET, UNET_GROUNDED, VAE_DECODER, open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.gpu.backend import DeviceBackend
from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError
from grounded_diffusion.engine.backends.onnxruntime_cpu import DTYPES, OnnxRuntimeBackend
from grounded_diffusion.engine.backends.open import open_backend
from grounded_diffusion.engine.sampling.batch import Request, make
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.errors import BackendError, NumericsError, UsageError
from grounded_diffusion.kernels import cfg_step, image_epilogue, mask_epilogue, reference
from grounded_diffusion.kernels.cuda import COEFFICIENTS

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

    def cfg_step(self, stream, coefficients, model_output, latents, history, noise, out_latents, out_input, *, count,
                 guided, doubled, half, bad, batch):  # fmt: skip
        def work():
            c = view(coefficients, (1,), COEFFICIENTS)[0]
            shape, kind = (batch, count // batch), np.float16 if half else np.float32
            terms, slots = c["terms"], max([c["head"], *c["slot"][: c["terms"]]]) + 1
            past = view(history, (slots, *shape), np.float32) if slots else None
            b = np.zeros(slots + 1)  # weights of the values of k steps ago
            b[0] = c["b0"]
            for weight, slot in zip(c["weight"][:terms], c["slot"][:terms], strict=True):
                b[(c["head"] - slot - 1) % slots + 1] = weight
            output = view(model_output, ((2 if guided else 1) * batch, shape[1]), kind).astype(np.float32)
            x, to = view(latents, shape, np.float32), view(out_input, ((2 if doubled else 1) * batch, shape[1]), kind)
            _, after = cfg_step(
                output, x, past, guidance_scale=float(c["guidance"]) if guided else None, cx=float(c["cx"]),
                co=float(c["co"]), a=float(c["a"]), b=b.tolist(), head=max(0, int(c["head"])),
                noise=view(noise, shape, np.float32) if c["n"] else None, n=float(c["n"]),
                next_scale=float(c["next_scale"]), out_latents=view(out_latents, shape, np.float32),
                out_input=np.empty(to.shape, np.float32),
            )  # fmt: skip
            to[:] = after
            flags = view(bad + int(c["row"]) * batch, (batch,), np.uint8)
            flags[~np.isfinite(view(out_latents, shape, np.float32)).all(1)] = 1

        stream.put(work)

    def image_epilogue(self, stream, image, out, *, batch, size, half, bad):
        def work():
            pixels = view(image, (batch, 3, *size), np.float16 if half else np.float32)
            image_epilogue(pixels, view(out, (batch, *size, 3), np.uint8))
            view(bad, (batch,), np.uint8)[~np.isfinite(pixels).all((1, 2, 3))] = 1

        stream.put(work)

    def mask_epilogue(self, stream, logits, valid, labels, area, box, score, stats, *, bits, bad, shape, size,
                      threshold, half):  # fmt: skip
        def work():
            low = view(logits, shape, np.float16 if half else np.float32).astype(np.float32)
            flags, top = view(valid, shape[:2], np.bool_), (*shape[:2],)
            result = mask_epilogue(low, flags, size, threshold)
            view(labels, (shape[0], *size), np.uint8)[:] = result.labels
            view(area, top, np.int64)[:], view(score, top, np.float32)[:] = result.area, result.score
            view(box, (*top, 4), np.int32)[:] = result.box
            words = reference.pack_bits(result.masks)
            view(bits, words.shape, np.uint32)[:] = words
            view(bad, (shape[0],), np.uint8)[~(np.isfinite(low).all((2, 3)) | ~flags).all(1)] = 1

        stream.put(work)


class HostDevice:
    """Host memory as a device. Memory starts as NaN, and what is freed becomes NaN again."""

    name = "host"

    def __init__(self, memory=1 << 40, eager=()):
        self.kernels, self.memory, self.blocks, self.eager = HostKernels(), memory, {}, eager
        self.streams, self.captures, self.replays = [], 0, 0

    def activate(self):
        pass

    def allocate(self, nbytes):
        if sum(block.nbytes for block in self.blocks.values()) + nbytes > self.memory:
            raise DeviceMemoryError(f"{nbytes} bytes are too many")
        raw = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -raw.ctypes.data % 256
        self.blocks[raw.ctypes.data + start] = raw
        return raw.ctypes.data + start

    def free(self, pointer):
        for stream in self.streams:
            stream.run(len(stream.waiting))
        self.blocks.pop(pointer)[:] = 0xFF

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


class HostNetworks:
    """The CPU's ONNX Runtime, on a device's memory."""

    name = "host"

    def __init__(self, backend, buckets=None):
        self.backend, self.fixed, self.spoil = backend, buckets, None

    def buckets(self, batch, objects, size):
        return self.fixed and [bucket for bucket in self.fixed if bucket[1] >= objects]

    def run(self, graph, inputs, stream):
        return self.backend.run(graph, inputs)

    def open(self, sizes, streams):
        return HostGraphs(self, sizes)

    def close(self):
        pass


class HostGraphs:
    capturable = True

    def __init__(self, networks, sizes):
        self.networks, self.sizes = networks, sizes

    def dtype(self, graph, tensor):
        session = self.networks.backend.graph(graph).session
        types = {value.name: value.type for value in (*session.get_inputs(), *session.get_outputs())}
        return np.dtype(DTYPES[types.get(tensor, "tensor(float)")])  # the CPU's UNets take products of the context

    def mask_size(self):
        s, f32 = self.sizes, np.float32
        inputs = {
            "latents": np.zeros((2, *s.latent), f32), "timestep": np.zeros(2, f32),
            "context": np.zeros((2, s.tokens, s.width), f32), "queries": np.zeros((1, 1, s.width), f32),
            "query_valid": np.ones((1, 1), np.bool_),
        }  # fmt: skip
        return self.networks.backend.run(UNET_GROUNDED, inputs)["mask_logits"].shape[2:]

    def bind(self, graph, tensors, stream):
        inputs = GRAPH_IO[graph][0]
        arrays = {name: view(t.pointer, t.shape, t.dtype) for name, t in tensors.items()}

        def work():
            outputs = self.networks.backend.run(graph, {name: arrays[name] for name in inputs})
            for name, value in outputs.items():
                arrays[name][:] = value
            if self.networks.spoil:
                self.networks.spoil(graph, arrays)

        def launch():
            for name, tensor in tensors.items():
                assert tensor.pointer % 256 == 0, f"{name} is not aligned"
            stream.put(work)

        return launch

    def close(self):
        pass


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    bundle = open_bundle(tiny_bundle)
    return GroundedPipeline(bundle, OnnxRuntimeBackend(bundle, threads=1))


PROMPTS = ["a [dog] and a [cat]", "a [unicorn]", "a [rocket] over the [sea] and a [dog]", "a [dragon]", "a [dog]"]


def request(pipe, count=3, draw=0, **changes):
    """A request of `count` images, made as the pipeline makes one."""
    from grounded_diffusion.engine.prompts.prompt import as_prompts

    given = {"sampler": "ddim", "steps": 5, "guidance_scale": 4.0, "guidance_interval": (0.0, 1.0)}
    options = Options(**(given | changes))
    schedule, shape = pipe.schedule(options), pipe.latent_shape(options)
    keys = [(7, draw + i) for i in range(count)]
    return Request(
        schedule=schedule,
        conditioning=pipe.condition(list(as_prompts(PROMPTS[:count]))),
        noise=batch_normal(keys, shape),
        size=options.image_size(pipe.bundle.manifest),
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        capture=schedule.capture_index(pipe.bundle.manifest.capture_timestep),
        step_noise=lambda row: batch_normal(keys, shape, row + 1),
        threshold=options.threshold,
    )


def assert_same(made, expected):
    """Two batches agree, but for roundings of a network that runs at another batch size."""
    masks, denoised = expected.masks, expected.denoised
    assert made.images.shape == expected.images.shape and made.masks.masks.shape == masks.masks.shape
    np.testing.assert_allclose(made.denoised.latents, denoised.latents, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made.denoised.mask_logits, denoised.mask_logits, rtol=1e-3, atol=1e-3)
    assert made.denoised.capture_timestep == denoised.capture_timestep
    assert np.abs(made.images.astype(int) - expected.images).max() <= 1
    assert (made.masks.masks == masks.masks).mean() > 0.999 and (made.masks.labels == masks.labels).mean() > 0.999
    assert np.abs(made.masks.area - masks.area).max() <= 4
    np.testing.assert_allclose(made.masks.score, masks.score, atol=1e-3)


def open_device(pipe, replay="step", memory=1 << 40, buckets=None, eager=()):
    networks = HostNetworks(pipe.backend, buckets)
    return DeviceBackend(pipe.bundle, HostDevice(memory, eager), networks, replay)


@pytest.mark.parametrize(
    ("replay", "options", "captures"),
    [
        ("none", {}, 0),
        ("step", {}, 2),  # plain, and the captured last step
        ("loop", {}, 1),
        ("step", {"sampler": "pndm"}, 2),
        ("loop", {"sampler": "euler", "steps": 3}, 1),
        ("step", {"sampler": "dpmpp-2m", "guidance_interval": (0.2, 0.7)}, 3),
        ("loop", {"sampler": "lcm", "steps": 2, "guidance_scale": 1.0}, 2),  # steps: noise is not captured
    ],
)
def test_it_equals_the_numpy_loop(pipe, replay, options, captures):
    backend = open_device(pipe, replay)
    requests = [request(pipe, draw=10 * i, **options) for i in range(3)]
    pending = [backend.submit(r) for r in requests]  # more than there are slots
    for waiting, r in reversed(list(zip(pending, requests, strict=True))):
        assert_same(waiting.result(), make(pipe.backend, r))
    assert backend.device.captures == captures
    assert backend.device.replays == {"none": 0, "step": 3 * len(requests[0].schedule.rows)}.get(
        replay, 6 if requests[0].schedule.stochastic else 3
    )
    backend.close()
    assert not backend.device.blocks, "all memory is freed"


@pytest.mark.parametrize("eager", [(0,), (0, 1), (1, 2)], ids=["loop", "loop and decode", "decode and copy"])
def test_no_stream_runs_over_another(pipe, eager):
    backend = open_device(pipe, eager=eager)
    requests = [request(pipe, draw=10 * i, steps=2) for i in range(4)]
    pending = [backend.submit(r) for r in requests]
    for waiting, r in zip(pending, requests, strict=True):
        assert_same(waiting.result(), make(pipe.backend, r))


def test_other_prompts_guidance_and_solver_replay_the_same_capture(pipe):
    backend = open_device(pipe)
    for changes in ({"guidance_scale": 2.0}, {"sampler": "dpmpp-2m", "steps": 3}, {"threshold": 0.3}):
        r = request(pipe, draw=5, **changes)
        assert_same(backend.submit(r).result(), make(pipe.backend, r))
    assert backend.device.captures == 2


def test_a_tail_is_padded_into_a_bucket_that_is_there(pipe):
    backend = open_device(pipe)
    for count in (4, 3, 1):
        r = request(pipe, count, steps=2)
        assert_same(backend.submit(r).result(), make(pipe.backend, r))
    assert [sizes.batch for sizes in backend._loops] == [4, 1]


def test_a_batch_is_split_over_the_engines_there_are(pipe):
    backend = open_device(pipe, buckets=[(2, 4), (2, 8), (1, 4)])
    r = request(pipe, 5, sampler="lcm", steps=2)
    assert_same(backend.submit(r).result(), make(pipe.backend, r))
    assert [(s.batch, s.objects) for s in backend._loops] == [(2, 4), (1, 4)]


def test_out_of_memory_goes_on_with_half_and_says_so(pipe):
    backend = open_device(pipe)
    backend.submit(request(pipe, 2, steps=2)).result()
    needed = sum(block.nbytes for block in backend.device.blocks.values())
    backend = open_device(pipe, memory=needed)
    r = request(pipe, 4, steps=2)
    with pytest.warns(UserWarning, match=r"batch of 4 does not fit at 64x64 in the memory of host; going on with 2"):
        made = backend.submit(r).result()
    assert_same(made, make(pipe.backend, r))
    assert [sizes.batch for sizes in backend._loops] == [2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.submit(r).result()  # remembered
    tiny = open_device(pipe, memory=1000)
    with pytest.raises(DeviceMemoryError, match=r"not even one image fits at 64x64 .*use a smaller --size"):
        tiny.submit(request(pipe, 1, steps=2)).result()
    large = open_device(pipe, memory=needed, buckets=[(4, 8)])
    with pytest.warns(UserWarning), pytest.raises(BackendError, match=r"no engine is small enough.*--batch 2"):
        large.submit(r).result()


@pytest.mark.parametrize(
    ("graph", "tensor", "call", "says"),
    [
        (UNET, "model_output", 2, "latents at step 2 of 4"),
        (UNET_GROUNDED, "mask_logits", 1, "mask logits at step 4 of 4"),
        (UNET_GROUNDED, "model_output", 1, "latents at step 4 of 4"),
        (VAE_DECODER, "image", 1, "pixels"),
    ],
)
def test_a_number_that_is_not_finite_is_named(pipe, graph, tensor, call, says):
    backend, calls = open_device(pipe), []

    def spoil(ran, arrays):
        calls.append(ran)
        if ran == graph and calls.count(graph) == call:
            arrays[tensor][1, 0, 0, 0] = np.inf

    backend.networks.spoil = spoil
    with pytest.raises(NumericsError, match=f"sample 1: the {says} are not finite"):
        backend.submit(request(pipe, 3, steps=4)).result()
    r = request(pipe, 3, steps=4)
    assert_same(backend.submit(r).result(), make(pipe.backend, r))  # nothing of it is left


def test_the_pipeline_runs_on_a_device(pipe):
    backend = open_device(pipe)
    prompts, options = PROMPTS, {"steps": 2, "batch": 2, "guidance_scale": 3.0}
    expected = list(pipe.generate(prompts, **options))
    made = list(GroundedPipeline(pipe.bundle, backend).generate(prompts, **options))
    assert [s.prompt for s in made] == [s.prompt for s in expected]
    for one, other in zip(made, expected, strict=True):
        assert np.abs(one.image.astype(int) - other.image).max() <= 1
        assert one.areas.keys() == other.areas.keys() and one.boxes.keys() == other.boxes.keys()
    calls = []

    def spoil(ran, arrays):
        calls.append(ran)
        if len(calls) == 1:
            arrays["model_output"][1] = np.nan

    backend.networks.spoil = spoil
    again = list(GroundedPipeline(pipe.bundle, backend).generate(prompts[:2], **options))  # each alone, after the NaN
    assert len(again) == 2 and np.abs(again[1].image.astype(int) - expected[1].image).max() <= 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda", r"onnxruntime .* has no CUDA provider; pip uninstall onnxruntime, then pip install '.*\[cuda\]'"),
        ("tensorrt", r"tensorrt cannot be imported .*; pip install 'grounded-diffusion\[tensorrt\]'"),
        ("tensorrt-rtx", r"tensorrt_rtx cannot be imported .*; pip install 'grounded-diffusion\[rtx\]'"),
    ],
)
def test_a_backend_that_is_not_installed_says_what_to_install(pipe, name, says, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=says):
        open_backend(name, pipe.bundle)


def test_a_machine_without_a_gpu_is_told_so(pipe, monkeypatch):
    import cuda.core

    def no_driver(number):
        raise RuntimeError("the driver is not there")

    monkeypatch.setattr(cuda.core, "Device", no_driver)
    with pytest.raises(BackendError, match=r"no CUDA device 0 .*the driver is not there.*check nvidia-smi"):
        open_backend("tensorrt-rtx", pipe.bundle)
    with pytest.raises(UsageError, match="no backend 'openvino'; choose one of onnxruntime, cuda"):
        open_backend("openvino", pipe.bundle)
