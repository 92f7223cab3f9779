"""The training loop every stage shares: resumable, seeded, averaged, and visible while it runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch

from grounded_diffusion.files import writing
from grounded_diffusion.training.emoji.config import StageConfig
from grounded_diffusion.training.optim import Muon


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
