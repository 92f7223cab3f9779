"""A few images by a bundle of a tiny model, on every backend."""

from grounded_diffusion.engine import GroundedPipeline, Options

PROMPTS = ["a photograph of a [dog] and a [cat]", "a [unicorn]"]
QUICK = Options(steps=3, sampler="ddim", batch=2)


def drawn(bundle, backend="onnxruntime", **changes):
    """Samples of PROMPTS, by a backend on the host."""
    with GroundedPipeline.open(bundle, backend=backend, threads=1) as pipe:
        return list(pipe.generate(PROMPTS, QUICK, **changes))


def drawn_by_device(bundle):
    """The same by the device's loop, on a device that is the host."""
    from grounded_diffusion.bundle import open_bundle
    from grounded_diffusion.engine.backends.gpu.backend import DeviceBackend
    from helpers.fake_gpu import HostDevice, HostRuntime

    opened, device = open_bundle(bundle), HostDevice()
    with GroundedPipeline(opened, DeviceBackend(opened, device, HostRuntime(opened, device), "step")) as pipe:
        return list(pipe.generate(PROMPTS, QUICK))
