"""The student: the teacher's network with a low-rank change, trained to take a step of its own in one call.

Given what the teacher's network was given at one of the student's timesteps, one unguided call and one DDIM step are to
end where the teacher, guided and in several steps, was at the next: progressive distillation (Salimans and Ho 2022)
with guidance distilled into it (Meng et al. 2023), in one go, on trajectories that are made once. As every step begins
where the teacher's own way led, no network has to run beside the student's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grounded_diffusion.engine.sampling.schedule import build_schedule
from grounded_diffusion.engine.sampling.solvers import Row
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import readable_errors, replace_file
from grounded_diffusion.training.distill.low_rank import add_changes, save_changes
from grounded_diffusion.training.distill.trajectories import Trajectories
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.loop import StageConfig, train

STUDENT, MEASURED = "student.safetensors", "student.json"
SAMPLER = "ddim"
HELD_BACK = 64  # trajectories that are only measured on


@dataclass(frozen=True, slots=True)
class StudentConfig:
    """How a student is trained: the pace, the rank of its change, and mixed precision ("fp32", "bf16")."""

    stage: StageConfig
    rank: int = 32
    precision: str = "fp32"

    def __post_init__(self):
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}; it must be at least 1")


class Student:
    """A frozen model with a trainable change, called at a few timesteps.

    Args:
        base: the model; its UNet is changed in place.
        timesteps: at which it is called, from noisy to clean.
        config: rank and precision.
    """

    def __init__(self, base: FrozenBase, timesteps: tuple[int, ...], config: StudentConfig):
        self.base, self.precision = base, config.precision
        scheduler = {**base.parts["scheduler"].config, "timesteps": list(timesteps)}
        self.rows: tuple[Row, ...] = build_schedule(scheduler, SAMPLER, len(timesteps)).rows
        torch.manual_seed(config.stage.seed)
        self.changes = add_changes(base.unet, config.rank)
        self.contexts: dict[str, torch.Tensor] = {}

    def context(self, texts: list[str]) -> torch.Tensor:
        """Text embeddings [B,L,D], each text encoded once."""
        for text in dict.fromkeys(texts):
            if text not in self.contexts:
                self.contexts[text] = self.base.contexts([text])[0]
        return torch.stack([self.contexts[text] for text in texts])

    def step(self, latents: torch.Tensor, rows: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Latents [B,4,h,w] at rows [B] of the schedule -> latents at the rows after them."""
        pick = lambda values: torch.tensor(values, device=latents.device, dtype=torch.float32)[rows]
        timesteps = pick([row.timestep for row in self.rows])
        # DDIM is x' = a x + b o with o the network's output.
        a, b = (pick(values).view(-1, 1, 1, 1) for values in ([r.a for r in self.rows], [r.b[0] for r in self.rows]))
        latents = latents.contiguous(memory_format=torch.channels_last)
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.base.unet(latents, timesteps, self.context(texts), return_dict=False)[0]
        return a * latents + b * output.float()

    @torch.no_grad()
    def sample(self, noise: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Noise [B,4,h,w] -> latents of images."""
        for row in range(len(self.rows)):
            noise = self.step(noise, torch.full((len(texts),), row), texts)
        return noise


def train_student(
    base: FrozenBase,
    trajectories: Trajectories,
    timesteps: tuple[int, ...],
    config: StudentConfig,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train a student and write its LoRA file; the same call goes on where it was stopped.

    Returns what was measured on trajectories held back, starting from the same noise: `error`, the mean square
    distance of the student's latents from the teacher's over the variance of those, and `untrained`, that of the model
    as it was.
    """
    began = time.monotonic()
    base.unet.to(memory_format=torch.channels_last)
    student, device = Student(base, timesteps, config), base.device
    held = max(1, min(HELD_BACK, len(trajectories) // 10))
    kept = torch.from_numpy(trajectories.latents[:held]).to(device, torch.float32)
    latents, texts = trajectories.latents[held:], trajectories.texts[held:]

    def measure() -> float:
        made = student.sample(kept[:, 0], trajectories.texts[:held])
        return ((made - kept[:, -1]).square().mean() / kept[:, -1].var()).item()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(latents), (config.stage.batch,), generator=generator)
        rows = torch.randint(len(timesteps), (config.stage.batch,), generator=generator)
        start, end = (torch.from_numpy(latents[picks, rows + k]).to(device, torch.float32) for k in (0, 1))
        return (student.step(start, rows, [texts[k] for k in picks.tolist()]) - end).square().mean()

    untrained = measure()
    say(f"error of the model without training: {untrained:.4f}")
    train("student", student.changes, config.stage, folder, loss, lambda module, step: f"error {measure():.4f}")
    about = {"sampler": SAMPLER, "timesteps": ",".join(map(str, timesteps)), "guidance_scale": "1"}
    measured = {"error": measure(), "untrained": untrained}
    with readable_errors(folder):
        save_changes(student.changes, folder / STUDENT, about)
        replace_file(folder / MEASURED, json.dumps(measured).encode() + b"\n")
    say(f"wrote {folder / STUDENT}, {time.monotonic() - began:.0f} s")
    return measured
