"""Images with masks a second: the engine and what a user would run instead, in one process, taking turns."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from grounded_diffusion.bench.environment import cpu_bound, environment, gpu_bound
from grounded_diffusion.bench.stages import GROUNDED, PLAIN, Stage, measure_stages
from grounded_diffusion.bench.systems import (
    ENGINE,
    FOLDER,
    Engine,
    FolderEngine,
    label_of,
    make_work,
    missing_packages,
    open_peer,
    precision_of,
    psnr,
    unet_share,
)
from grounded_diffusion.bench.timing import alternate, clock
from grounded_diffusion.bench.work import OBJECTS, Output, Plan, System, Work
from grounded_diffusion.engine import GroundedPipeline, Options
from grounded_diffusion.engine.checks import usable_cores
from grounded_diffusion.errors import BackendError, ParityError

BUDGET = 90.0  # seconds of timed turns, where their number is not given
LEAST, MOST = 3, 9  # rounds, then
LEAST_PSNR = {"fp32": 30.0, "bf16": 30.0, "fp16": 30.0, "int8": 25.0}  # dB; below this it has not done the same work
Report = Callable[[str], None]


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
        elif plan.device == "cpu" and peer.endswith("bf16") and not cpu_has_bf16():
            reasons[peer] = "this CPU has no bf16 instructions"
    return reasons


def torch_has_cuda() -> bool:
    """Whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for BF16."""
    from grounded_diffusion.training.devices import has_bf16

    return has_bf16("cpu")


def engine_names(plan: Plan) -> list[str]:
    """All engines, and the first of them with the writer."""
    names = [f"{ENGINE} {label}" for label in plan.engines]
    return [names[0], names[0] + FOLDER, *names[1:]]


def open_named(name: str, pipe: GroundedPipeline, plan: Plan) -> System:
    """A system by its name in the table; `pipe` is the engine that it is, for a peer any."""
    if name.startswith(ENGINE):
        options = plan.of_engine(label_of(name))
        return FolderEngine(pipe, options, plan.folder / "out", name) if FOLDER in name else Engine(pipe, options, name)
    import torch

    torch.set_num_threads(plan.threads)
    asked = plan.options.of_model(pipe.bundle.manifest)
    capture = pipe.schedule(asked).capture_index(pipe.bundle.manifest.capture_timestep)
    exports = plan.folder / "exports"
    exports.mkdir(exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(plan.folder / "inductor")  # nothing is compiled before it is timed
    more = dict(
        device=plan.device,
        folder=exports,
        objects=OBJECTS,
        size=pipe.latent_shape(plan.options)[1:],
        threads=0 if plan.threads == usable_cores() else plan.threads,
    )
    return open_peer(name, plan.checkpoint, pipe.bundle.manifest, asked, capture, plan.form(name), **more)


def agreement(name: str, output: Output, expected: Output) -> dict[str, float]:
    """PSNR and mask IoU of a round against the engine's, the worst and all as one.

    Raises ParityError if it made other images: in FP32 one of them, in a coarser precision on average.
    """
    count = min(len(output.images), len(expected.images))  # of a shorter turn, the same first images
    output, expected = (Output(one.images[:count], one.masks[:count]) for one in (output, expected))
    both, either = output.masks & expected.masks, output.masks | expected.masks
    each = np.where(either.sum((2, 3)), both.sum((2, 3)) / either.sum((2, 3)).clip(1), 1.0)
    apart = psnr(output.images, expected.images)
    found = {
        "psnr": float(apart.min()),
        "psnr_mean": float(apart.mean()),
        "mask_iou": float(each.min()),
        "mask_iou_pooled": float(both.sum() / either.sum()) if either.any() else 1.0,
    }
    least = found["psnr"] if precision_of(name) == "fp32" else found["psnr_mean"]
    if least < LEAST_PSNR[precision_of(name)]:
        raise ParityError(f"{name} makes other images than the engine: {least:.1f} dB; the times mean nothing")
    return found


def measure_speed(
    pipes: Mapping[str, GroundedPipeline], plan: Plan, report: Report = lambda line: None
) -> dict[str, Any]:
    """Everything: the bound, the stages, all systems end to end, their memory.

    Args:
        pipes: the engines, by their names in plan.engines.

    Raises:
        ParityError: a peer does not make the engine's images.
    """
    label, pipe = next(iter(pipes.items()))
    options = plan.of_engine(label)
    result: dict[str, Any] = {"environment": environment(pipe.bundle, plan.threads), "omitted": omitted_peers(plan)}
    for peer, reason in result["omitted"].items():
        report(f"LEFT OUT: {peer} ({reason})")
    if not missing_packages("eager"):
        import torch

        torch.set_num_threads(plan.threads)
    rates = gpu_bound() if plan.device == "cuda" else cpu_bound(precision_of(engine_names(plan)[0]))
    bound = max(rates.values(), default=None)
    result["bound"] = {"rates": rates, "flops_per_s": bound}
    work = lambda name, number: make_work(pipe.bundle.manifest, pipe.latent_shape(options), plan.turn(name), number)
    report("measuring the stages")
    one_call = make_work(pipe.bundle.manifest, pipe.latent_shape(options), pipe.batch_size(options), 0)
    heads = plan.checkpoint if not missing_packages("eager") and plan.device == "cpu" else None
    stages = measure_stages(pipe, one_call, options, plan.repeats, heads)
    result["stages"] = [stage.record(bound) for stage in stages]

    systems, prepared, result["agreement"] = prepare(pipes, plan, work, result["omitted"], report)
    rounds = (lambda first: plan.rounds) if plan.rounds else (lambda first: min(MOST, max(LEAST, int(BUDGET / first))))
    runs = {
        name: lambda number, name=name, system=system: system.run(work(name, number))
        for name, system in systems.items()
    }
    timings, result["order"] = alternate(runs, rounds, report)
    fastest = {name: min(timings[name].seconds) for name in prepared}
    result["prepare_s"] = {name: max(0.0, spent - fastest[name]) for name, spent in prepared.items()}
    result["unet_share"] = share_of_unet(pipe, plan, options, stages, work(ENGINE, MOST))
    peaks = peak_memory(pipe, plan, list(systems), report) if plan.memory else {}
    result["systems"] = [
        {
            "name": name,
            "precision": precision_of(name),
            "images": plan.turn(name),
            "images_per_s": plan.turn(name) / timing.median,
            **timing.record(),
            "peak_memory": peaks.get(name),
        }
        for name, timing in timings.items()
    ]
    result["setting"] = {
        **{name: getattr(plan.options, name) for name in ("sampler", "steps", "guidance_scale")},
        **{name: value for name, value in plan.dump().items() if name in ("images", "repeats", "engines")},
        "peer_forms": {name: asdict(plan.form(name)) for name in systems if not name.startswith(ENGINE)},
        "rounds": max(len(timing.seconds) for timing in timings.values()),
    }
    return result


def prepare(
    pipes: Mapping[str, GroundedPipeline],
    plan: Plan,
    work: Callable[[str, int], Work],
    omitted: dict[str, str],
    report: Report,
) -> tuple[dict[str, System], dict[str, float], dict[str, dict[str, float]]]:
    """All systems, warm; seconds from opening a peer to the end of its first turn; agreement.

    A peer that cannot be opened is said to be left out and added to `omitted`.
    """
    systems = {name: open_named(name, pipes[label_of(name)], plan) for name in engine_names(plan)}
    made = {name: system.run(work(name, 0)) for name, system in systems.items()}
    expected = {name: output for name, output in made.items() if FOLDER not in name}
    exact = list(expected.values())[-1]
    agreed = {name: agreement(name, output, exact) for name, output in expected.items() if output is not exact}
    seconds = {}
    for name in (peer for peer in plan.peers if peer not in omitted):
        report(f"preparing {name}")
        start = time.perf_counter()
        try:
            systems[name] = open_named(name, next(iter(pipes.values())), plan)
        except BackendError as error:
            omitted[name] = str(error)
            report(f"LEFT OUT: {name} ({error})")
            continue
        output = systems[name].run(work(name, 0))
        seconds[name] = time.perf_counter() - start
        agreed[name] = agreement(name, output, exact)
    return systems, seconds, agreed


def share_of_unet(pipe: GroundedPipeline, plan: Plan, options: Options, stages: Sequence[Stage], work: Any) -> float:
    """Share of the engine's time in the UNet: clocked where the loop is the host's, else from the stages' times."""
    if plan.device == "cpu":
        return unet_share(pipe, options, work)
    times = {stage.name: stage.timing.median for stage in stages}
    calls = len(pipe.schedule(options).rows)
    batches = math.ceil(plan.images / next(stage.images for stage in stages))
    busy = batches * ((calls - 1) * times[PLAIN] + times[GROUNDED])
    return min(1.0, busy / clock(lambda: Engine(pipe, options).run(work)))


def peak_memory(pipe: GroundedPipeline, plan: Plan, names: Sequence[str], report: Report) -> dict[str, int | None]:
    """Peak bytes of every system: resident memory of a process that runs one turn, or the GPU's where that is used."""
    peaks: dict[str, int | None] = {}
    for name in names:
        report(f"measuring the memory of {name}")
        request = {"system": name, "model": str(pipe.bundle.path), "plan": plan.dump()}
        command = [sys.executable, "-P", "-m", "grounded_diffusion.bench.memory", json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak"] if done.returncode == 0 else None
        if done.returncode:
            reason = (done.stderr.strip() or "it was killed").splitlines()[-1]
            report(f"the memory of {name} was not measured: {reason}")
    return peaks
