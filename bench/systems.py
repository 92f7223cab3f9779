"""The systems that a bench compares, and the work it gives them. Nothing here needs torch: peers are opened on demand.

Every system gets the same prompts, noise, sampler, steps and guidance, and gives back images and masks.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bench.work import OBJECTS, Output, PeerForm, System, Work
from grounded_diffusion.bundle import UNET, UNET_GROUNDED, Manifest
from grounded_diffusion.engine import GroundedPipeline, Options, Prompt
from grounded_diffusion.engine.backends.host import HostBackend
from grounded_diffusion.engine.dataset.formats import Settings, open_format
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.shards import encode_shard
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.sampling.backend import Backend
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.errors import UsageError

ENGINE, FOLDER = "engine", ", folder writer"
CPU_KINDS = ("openvino", "compile", "eager")
PEERS = {  # by device, the kind and the precision of each
    "cpu": (*(f"{kind} {name}" for name in ("bf16", "fp32") for kind in CPU_KINDS), "onnxruntime fp32"),
    "cuda": ("eager fp16", "compile fp16", "onnxruntime fp16"),
}
NEEDED = ("torch", "diffusers", "transformers")
EXPORTED = {"onnxruntime": ("onnxscript",), "openvino": ("onnxscript", "openvino")}  # needed beside those
FALLBACK_NAMES = ("dog", "cat")
SEED = 31
WRITER_THREADS = 2


def precision_of(system: str) -> str:
    """A system's precision, the second word of its name."""
    return system.replace(",", "").split()[1]


def label_of(system: str) -> str:
    """Which of the engines one of the engine's systems is: its name in Plan.engines."""
    return system.removeprefix(f"{ENGINE} ").removesuffix(FOLDER)


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio [n], in dB, of 8-bit images [n,H,W,3]; 99 at most."""
    errors = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
    return np.minimum(99.0, 10 * np.log10(255**2 / np.maximum(errors, 1e-12)))


def all_names(manifest: Manifest) -> list[str]:
    """Names the model was trained to draw, at least two."""
    names = [name for group in manifest.names.values() for name in group]
    return names if len(names) >= OBJECTS else [*FALLBACK_NAMES]


def make_work(manifest: Manifest, shape: tuple[int, ...], count: int, number: int) -> Work:
    """Round `number`: pairs of names of its own, so that no system has their prompts encoded from the round before."""
    rng, names = np.random.default_rng([SEED, number]), all_names(manifest)
    pairs = [[names[i] for i in rng.choice(len(names), OBJECTS, replace=False)] for _ in range(count)]
    prompts = tuple(Prompt("a photograph of a " + " and a ".join(pair), tuple(pair)) for pair in pairs)
    return Work(prompts, batch_normal([(SEED + number, i) for i in range(count)], shape))


class Engine:
    """Our own engine; samples are dropped as they come."""

    def __init__(self, pipe: GroundedPipeline, options: Options, name: str = ENGINE):
        self.pipe, self.options, self.name = pipe, options, name

    def run(self, work: Work) -> Output:
        samples = list(self.pipe.generate(work.prompts, self.options, noise=work.noise))
        masks = [np.stack([found.mask for found in sample.objects]) for sample in samples]
        return Output(np.stack([sample.image for sample in samples]), np.stack(masks))


class FolderEngine:
    """Our own engine with the default writer: every round becomes a shard of a data set below `out`, safe on disk.

    Samples are encoded in threads while the next are made, as a run's are.
    """

    def __init__(self, pipe: GroundedPipeline, options: Options, out: Path, name: str = ENGINE + FOLDER):
        self.pipe, self.options, self.name = pipe, options, name
        self.storage, self.format, self._rounds = open_storage(out), open_format("folder", Settings()), 0

    def run(self, work: Work) -> None:
        with ThreadPoolExecutor(WRITER_THREADS) as pool:
            samples = self.pipe.generate(work.prompts, self.options, noise=work.noise)
            encoding = [pool.submit(self.format.encode, Record.from_sample(sample)) for sample in samples]
            encoded = [future.result() for future in encoding]
        files = list(self.format.pack(self._rounds, self._rounds + 1, encoded))
        record = encode_shard(self._rounds, 0, [sample.row for sample in encoded], files)
        self.storage.commit(self._rounds, files, record)
        self._rounds += 1


class TimedBackend(HostBackend):
    """The host's loop on a backend's graphs, with the seconds of every call of one noted."""

    def __init__(self, backend: Backend):
        super().__init__(backend.lanes)
        self.name, self._backend = backend.name, backend
        self.calls: list[tuple[str, float]] = []  # (graph, seconds), appended by several threads

    def default_batch(self, latent_cells: int) -> int:
        return self._backend.default_batch(latent_cells)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        try:
            return self._backend.run(graph, inputs)
        finally:
            self.calls.append((graph, time.perf_counter() - start))


def unet_share(pipe: GroundedPipeline, options: Options, work: Work) -> float:
    """Share of a round's time that the host's loop spends in the UNet's graphs, averaged over the backend's lanes."""
    timed = TimedBackend(pipe.backend)
    start = time.perf_counter()
    with GroundedPipeline(pipe.bundle, timed) as twin:
        for _ in twin.generate(work.prompts, options, noise=work.noise):
            pass
    elapsed = time.perf_counter() - start
    inside = sum(seconds for graph, seconds in timed.calls if graph in (UNET, UNET_GROUNDED))
    return inside / (elapsed * pipe.backend.lanes)


def missing_packages(peer: str) -> list[str]:
    """Packages a peer needs that are not installed."""
    needed = (*NEEDED, *EXPORTED.get(peer.partition(" ")[0], ()))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def open_peer(
    name: str, checkpoint: Path, manifest: Manifest, options: Options, capture: int, form: PeerForm, **more: Any
) -> System:
    """A peer on a checkpoint, or on a model with the head that the engine's bundle has.

    Args:
        name: its kind and precision, as in PEERS.
        manifest: of the engine's bundle.
        capture: index of the UNet call at which the head reads.
        form: batch and layout at which it is fastest.
        more: `device`; and for exported ones `folder`, `objects`, `size` and `threads`.

    Raises:
        UsageError: an unknown name, or settings that peers do not have.
        CheckpointError: the checkpoint cannot be loaded.
    """
    if name not in {peer for peers in PEERS.values() for peer in peers}:
        raise UsageError(f"there is no peer {name!r}; choose from {', '.join(map(', '.join, PEERS.values()))}")
    from grounded_diffusion.bench.peers_onnx import KINDS
    from grounded_diffusion.training.checkpoint import as_exported

    kind, precision = name.split()
    if kind not in EXPORTED:
        more = {key: value for key, value in more.items() if key == "device"}
    return KINDS[kind](as_exported(checkpoint, manifest), options, capture, precision, form, **more)
