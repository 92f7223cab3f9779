"""Images with masks a second: the engine and what a user would run instead, in one process, taking turns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grounded_diffusion.bench.environment import cpu_bound, environment, gpu_bound
from grounded_diffusion.bench.stages import GROUNDED, PLAIN, Stage, measure_stages
from grounded_diffusion.bench.systems import (
    ENGINE,
    FOLDER,
    Engine,
    FolderEngine,
    make_work,
    missing_packages,
    open_peer,
    psnr,
    unet_share,
)
from grounded_diffusion.bench.timing import alternate, clock
from grounded_diffusion.bench.work import OBJECTS, Output, System, Work
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.backends.open import backend_entry
from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.errors import BackendError, ParityError

BUDGET = 90.0  # seconds of timed turns, where their number is not given
LEAST, MOST = 3, 9  # rounds, then
LEAST_PSNR = 30.0  # dB; below this a peer has not done the same work
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        options: sampler, steps, guidance; and the engine's batch.
        threads: CPU threads of every system.
        peers: names of the peers.
        peer_batch: images to a call of theirs.
        images: to a turn, of every system.
        rounds: timed turns of every system; None takes what fits into BUDGET.
        repeats: timed calls of every stage.
        backend: of the engine; peers run on the CPU with "onnxruntime", else on the GPU.
        checkpoint: directory of the torch model that the peers load; None where there is none.
        folder: an empty folder to work in.
        memory: measure peak memory, in a process of its own for each system.
    """

    options: Options
    threads: int
    peers: tuple[str, ...]
    peer_batch: int
    images: int
    rounds: int | None
    repeats: int
    backend: str
    checkpoint: Path | None
    folder: Path
    memory: bool = True

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return backend_entry(self.backend).device

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        paths = {"checkpoint": self.checkpoint and str(self.checkpoint), "folder": str(self.folder)}
        return asdict(self) | paths

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> Plan:
        """What `dump` gave."""
        paths = {"checkpoint": dumped["checkpoint"] and Path(dumped["checkpoint"]), "folder": Path(dumped["folder"])}
        return cls(**dumped | paths | {"options": Options(**dumped["options"]), "peers": tuple(dumped["peers"])})


def omitted_peers(plan: Plan) -> dict[str, str]:
    """Peers that cannot run here, and why."""
    reasons = {}
    for peer in plan.peers:
        if missing := missing_packages(peer):
            reasons[peer] = f"not installed: {', '.join(missing)}"
        elif plan.checkpoint is None:
            reasons[peer] = "no checkpoint for torch; give one with --ckpt"
        elif plan.device == "cuda" and not torch_has_cuda():
            reasons[peer] = "torch sees no GPU"
    return reasons


def torch_has_cuda() -> bool:
    """Whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def open_named(name: str, pipe: GroundedPipeline, plan: Plan) -> System:
    """A system by its name in the table."""
    if name == ENGINE:
        return Engine(pipe, plan.options)
    if name == FOLDER:
        return FolderEngine(pipe, plan.options, plan.folder / "out")
    import torch

    torch.set_num_threads(plan.threads)
    capture = pipe.schedule(plan.options).capture_index(pipe.bundle.manifest.capture_timestep)
    exports = plan.folder / "exports"
    exports.mkdir(exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(plan.folder / "inductor")  # nothing is compiled before it is timed
    size = pipe.latent_shape(plan.options)[1:]
    more = dict(
        device=plan.device,
        folder=exports,
        objects=OBJECTS,
        size=size,
        threads=0 if plan.threads == usable_cores() else plan.threads,
    )
    return open_peer(name, plan.checkpoint, plan.options, capture, plan.peer_batch, **more)


def agreement(name: str, output: Output, expected: Output) -> dict[str, float]:
    """Worst PSNR and mask IoU of a peer's round against the engine's. Raises ParityError if it made other images."""
    both = (output.masks & expected.masks).sum((2, 3))
    either = (output.masks | expected.masks).sum((2, 3))
    iou = np.where(either, both / either.clip(1), 1.0)
    found = {"psnr": float(psnr(output.images, expected.images).min()), "mask_iou": float(iou.min())}
    if found["psnr"] < LEAST_PSNR:
        raise ParityError(f"{name} makes other images than the engine: {found['psnr']:.1f} dB; the times mean nothing")
    return found


def measure_speed(pipe: GroundedPipeline, plan: Plan, report: Report = lambda line: None) -> dict[str, Any]:
    """Everything: the bound, the stages, all systems end to end, their memory.

    Raises:
        ParityError: a peer does not make the engine's images.
    """
    result: dict[str, Any] = {"environment": environment(pipe.bundle, plan.threads), "omitted": omitted_peers(plan)}
    for peer, reason in result["omitted"].items():
        report(f"LEFT OUT: {peer} ({reason})")
    if not missing_packages("eager"):
        import torch

        torch.set_num_threads(plan.threads)
    rates = gpu_bound() if plan.device == "cuda" else cpu_bound()
    bound = max(rates.values(), default=None)
    result["bound"] = {"rates": rates, "flops_per_s": bound}
    work = lambda number: make_work(pipe.bundle.manifest, pipe.latent_shape(plan.options), plan.images, number)
    report("measuring the stages")
    batch = pipe.batch_size(plan.options)
    one_call = make_work(pipe.bundle.manifest, pipe.latent_shape(plan.options), batch, 0)
    heads = plan.checkpoint if not missing_packages("eager") and plan.device == "cpu" else None
    stages = measure_stages(pipe, one_call, plan.options, plan.repeats, heads)
    result["stages"] = [stage.record(bound) for stage in stages]

    systems, warm, prepared, result["agreement"] = prepare(pipe, plan, work, result["omitted"], report)
    rounds = plan.rounds or min(MOST, max(LEAST, int(BUDGET / sum(warm.values()))))
    runs = {name: lambda number, system=system: system.run(work(number)) for name, system in systems.items()}
    timings, result["order"] = alternate(runs, rounds, report)
    fastest = {name: min(timings[name].seconds) for name in prepared}
    result["prepare_s"] = {name: max(0.0, spent - fastest[name]) for name, spent in prepared.items()}
    result["unet_share"] = share_of_unet(pipe, plan, stages, work(rounds))
    peaks = peak_memory(pipe, plan, list(systems), report) if plan.memory else {}
    result["systems"] = [
        {"name": name, "images_per_s": plan.images / timing.median, **timing.record(), "peak_memory": peaks.get(name)}
        for name, timing in timings.items()
    ]
    result["setting"] = {
        **{name: getattr(plan.options, name) for name in ("sampler", "steps", "guidance_scale")},
        **{name: getattr(plan, name) for name in ("images", "repeats", "peer_batch", "backend")},
        "rounds": rounds,
        "batch": batch,
        "lanes": pipe.backend.lanes,
    }
    return result


def prepare(
    pipe: GroundedPipeline, plan: Plan, work: Callable[[int], Work], omitted: dict[str, str], report: Report
) -> tuple[dict[str, System], dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """All systems, warm; seconds of the last turn; those from opening a peer to the end of its first; agreement.

    A peer that cannot be opened is said to be left out and added to `omitted`.
    """
    systems = {name: open_named(name, pipe, plan) for name in (ENGINE, FOLDER)}
    for system in systems.values():
        system.run(work(0))
    expected = systems[ENGINE].run(work(0))
    warm = {name: clock(lambda system=system: system.run(work(0))) for name, system in systems.items()}
    seconds, agreed = {}, {}
    for name in (peer for peer in plan.peers if peer not in omitted):
        report(f"preparing {name}")
        start = time.perf_counter()
        try:
            systems[name] = open_named(name, pipe, plan)
        except BackendError as error:
            omitted[name] = str(error)
            report(f"LEFT OUT: {name} ({error})")
            continue
        output = systems[name].run(work(0))
        seconds[name] = time.perf_counter() - start
        warm[name] = clock(lambda name=name: systems[name].run(work(0)))
        agreed[name] = agreement(name, output, expected)
    return systems, warm, seconds, agreed


def share_of_unet(pipe: GroundedPipeline, plan: Plan, stages: Sequence[Stage], work: Any) -> float:
    """Share of the engine's time in the UNet: clocked where the loop is the host's, else from the stages' times."""
    if plan.device == "cpu":
        return unet_share(pipe, plan.options, work)
    times = {stage.name: stage.timing.median for stage in stages}
    calls = len(pipe.schedule(plan.options).rows)
    batches = math.ceil(plan.images / next(stage.images for stage in stages))
    busy = batches * ((calls - 1) * times[PLAIN] + times[GROUNDED])
    return min(1.0, busy / clock(lambda: Engine(pipe, plan.options).run(work)))


def peak_memory(pipe: GroundedPipeline, plan: Plan, names: Sequence[str], report: Report) -> dict[str, int | None]:
    """Peak bytes of every system: resident memory of a process that runs one turn, or the GPU's where that is used."""
    peaks: dict[str, int | None] = {}
    for name in names:
        report(f"measuring the memory of {name}")
        request = {"system": name, "model": str(pipe.bundle.path), "lanes": pipe.backend.lanes, "plan": plan.dump()}
        command = [sys.executable, "-P", "-m", "grounded_diffusion.bench.memory", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak"] if done.returncode == 0 else None
        if done.returncode:
            reason = (done.stderr.strip() or "it was killed").splitlines()[-1]
            report(f"the memory of {name} was not measured: {reason}")
    return peaks
