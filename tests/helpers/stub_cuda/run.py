"""Batches on `--backend cuda` over stub libraries, and what the libraries were called for, as JSON.

python -m helpers.stub_cuda.run BUNDLE      with LD_LIBRARY_PATH naming the stubs and a driver of host memory
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.open import open_backend
from grounded_diffusion.engine.prompts.prompt import as_prompts
from grounded_diffusion.engine.sampling.batch import BatchRequest
from grounded_diffusion.engine.sampling.noise import batch_normal

STEPS, BATCH = 5, 2


class Stubs:
    """What the stub libraries have counted."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcudart.so.13")
        self.library.stub_counts.restype = ctypes.c_char_p
        self.library.stub_used.restype = self.library.stub_peak.restype = ctypes.c_size_t

    def counts(self) -> dict[str, int]:
        """Calls since the last time, by name; cuDNN's descriptors are left out."""
        lines = [line.split(" ", 1) for line in self.library.stub_counts().decode().splitlines()]
        self.library.stub_reset()
        return {name: int(count) for count, name in lines if not name.startswith("cudnn")}


def request(pipe: GroundedPipeline) -> BatchRequest:
    """A batch whose first step is unguided, so that every kind of call is among its steps."""
    options = Options(sampler="ddim", steps=STEPS, guidance_scale=4.0, guidance_interval=(0.2, 1.0))
    schedule = pipe.schedule(options)
    return BatchRequest(
        schedule=schedule,
        conditioning=pipe.condition(list(as_prompts(["a [dog] and a [cat]", "a [dog]"]))),
        noise=batch_normal([(7, i) for i in range(BATCH)], pipe.latent_shape(options)),
        size=options.image_size(pipe.bundle.manifest),
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        capture=schedule.capture_index(pipe.bundle.manifest.capture_timestep),
    )


def main(path: str) -> None:
    stubs, bundle = Stubs(), open_bundle(path)
    with GroundedPipeline(bundle, open_backend("onnxruntime", bundle, threads=1)) as host:
        asked, told = request(host), {}  # the text encoder's shapes are computed as it runs, which stubs do not do
    with GroundedPipeline(bundle, open_backend("cuda", bundle)) as pipe:
        stubs.counts()
        for name in ("first", "second"):
            images = pipe.backend.submit(asked).result().images
            told[name] = stubs.counts()
        (loop,) = pipe.backend._loops.values()
        sessions = [" ".join(map(str, key)) for key in loop.graphs._sessions]
        (sizes,) = pipe.backend._loops
        told |= {
            "shape": list(np.shape(images)), "sessions": sessions, "used": stubs.library.stub_used(),
            "counted": pipe.backend.runtime.memory(sizes),
        }  # fmt: skip
    told["left"] = stubs.library.stub_used()
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
