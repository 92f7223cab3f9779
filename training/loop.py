"""The training loop every stage shares: resumable, seeded, averaged, and visible while it runs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import writing
from grounded_diffusion.training.optim import Muon


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Length and pace of one stage.

    Attributes:
        steps: optimiser steps; raise or lower it and run again to go on or to finish sooner.
        batch: images a step.
        lr: learning rate of AdamW's share of the parameters.
        muon_lr: learning rate of Muon's share; 0 trains everything with AdamW.
        warmup: steps of linear warm-up.
        cooldown: last share of the steps, over which the rate falls linearly to zero.
        weight_decay: decoupled decay of matrices.
        ema: decay of the running average of the weights that is kept as the result; 0 keeps none.
        seed: of initial weights, data and noise.
        sample_every: steps between sample grids.
        save_every: steps between resumable states.
        compile: use torch.compile; repays its minutes only in long runs.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.02
    warmup: int = 50
    cooldown: float = 0.5
    weight_decay: float = 0.0
    ema: float = 0.0
    seed: int = 0
    sample_every: int = 500
    save_every: int = 500
    compile: bool = False

    def __post_init__(self):
        for name in ("steps", "batch", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "muon_lr", "weight_decay", "warmup", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be a finite number of at least 0")
        if not 0 <= self.ema < 1 or not 0 < self.cooldown <= 1:
            raise UsageError("ema must lie in [0, 1) and cooldown in (0, 1]")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, plateau, linear cool-down."""
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / (self.cooldown * self.steps))


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: the same however often the run was stopped and resumed."""
    return torch.Generator().manual_seed((seed << 32) + step)


def make_optimizer(module: torch.nn.Module, config: StageConfig) -> torch.optim.Optimizer:
    if config.muon_lr:
        return Muon(module, config.lr, config.muon_lr, config.weight_decay)
    groups = [dict(params=[p for p in module.parameters() if p.requires_grad], lr=config.lr, peak=config.lr)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def train(
    name: str,
    module: torch.nn.Module,
    config: StageConfig,
    folder: Path,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    sample: Callable[[torch.nn.Module, int], str] | None = None,
) -> torch.nn.Module:
    """Train `module` and return its averaged weights (or the last ones, without averaging).

    Args:
        name: of the stage; names its state file and its lines of output.
        module: trained in place.
        config: length and pace.
        folder: holds `<name>.state.pt`, from which the same call goes on.
        loss: (step, generator) -> scalar loss of a fresh batch.
        sample: (averaged module, step) -> a line of measurements; called every `sample_every` steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"{name}.state.pt"
    optimizer = make_optimizer(module, config)
    average = copy.deepcopy(module).requires_grad_(False) if config.ema else module
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    began, running = time.monotonic(), None
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * config.rate(step)
        value = loss(step, step_generator(config.seed, step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if config.ema:
            decay = min(config.ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()

        done = step + 1
        if done % 50 == 0 or done == config.steps:
            pace = (done - start) / (time.monotonic() - began)
            eta = (config.steps - done) / pace / 60
            line = (
                f"{name} {done}/{config.steps} loss {running:.4f} {pace * config.batch:.1f} img/s, {eta:.1f} min left"
            )
            print(line, flush=True)
        if sample and (done % config.sample_every == 0 or done == config.steps):
            average.eval()
            with torch.no_grad():
                print(f"{name} {done}: {sample(average, done)}", flush=True)
            average.train()
        if done % config.save_every == 0 or done == config.steps:
            state = dict(
                module=module.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict(), step=done
            )
            with writing(state_file) as stream:
                torch.save(state, stream)
    return average.eval()
