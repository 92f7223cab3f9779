"""A model without a network, for tests of what surrounds it: hundreds of images a second, the same on any machine.

`python null_backend.py ARGUMENTS` is gd-infer with it. Samples whose noise begins above FAILS come back as NaN.
"""

import sys

import numpy as np

from grounded_diffusion.bundle import TEXT_ENCODER, UNET, UNET_GROUNDED, VAE_DECODER
from grounded_diffusion.engine.backends.host import HostBackend
from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND, BackendEntry
from grounded_diffusion.engine.cli import infer
from grounded_diffusion.engine.sampling.backend import both_halves

FAILS = 0.8  # of a standard normal: about every fifth sample


class NullBackend(HostBackend):
    """Element by element, so that a sample does not depend on its batch."""

    name, fails = "null", np.inf

    def __init__(self, bundle, threads=None, lanes=1):
        super().__init__(lanes)
        self.manifest = bundle.manifest

    def run(self, graph, inputs):
        if graph == TEXT_ENCODER:
            ids = inputs["input_ids"][..., None] * np.arange(1, self.manifest.context_dim + 1)
            return {"context": (ids % 97 / 97 - 0.5).astype(np.float32)}
        latents = inputs["latents"]
        if graph == VAE_DECODER:
            scale = self.manifest.vae_scale_factor
            return {"image": np.tanh(latents[:, :3]).repeat(scale, 2).repeat(scale, 3)}
        assert graph in (UNET, UNET_GROUNDED)
        inputs = both_halves(inputs)
        latents, batch = inputs["latents"], len(latents)
        output = np.tanh(latents) + inputs["context"][:, :1, :1, None]
        output[latents[:, 0, 0, 0] > self.fails] = np.nan
        outputs = {"model_output": output.astype(np.float32)}
        if graph == UNET_GROUNDED:
            plane = latents[batch:, 0] - latents[batch:, 0].mean((1, 2), keepdims=True)
            bias = np.tanh(inputs["queries"][:, :, 0]) + np.tanh(plane[:, 0, :1])
            outputs["mask_logits"] = 2 * plane[:, None] + bias[:, :, None, None]
        return outputs


class FailingBackend(NullBackend):
    fails = FAILS


def backend_of(kind):
    """An entry of the table of backends."""
    return BackendEntry("cpu", "fp32", lambda bundle, threads, lanes, *_: kind(bundle, threads, lanes))


def main(argv, backend=NullBackend):
    """gd-infer."""
    before = BACKENDS[DEFAULT_BACKEND]
    BACKENDS[DEFAULT_BACKEND] = backend_of(backend)
    try:
        return infer.main([str(argument) for argument in argv])
    finally:
        BACKENDS[DEFAULT_BACKEND] = before


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
