"""The teacher's way from noise to image, kept at the timesteps at which the student will be called.

The teacher is a bundle in the engine, guided, with a solver of second order and several steps between two of the
student's. What is kept of an image is what the network was given at the student's timesteps, and where the way ended.

    trajectories.json          what they are: the teacher, the schedule, the prompts
    trajectories/000012.npz    `latents` float16 [N,S+1,4,h,w] of images 12 * PER_FILE and on

A file's random numbers come from its index, so a run that was stopped goes on to the same files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from grounded_diffusion.bundle import UNET, UNET_GROUNDED
from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.sampling.backend import Arrays, Backend
from grounded_diffusion.engine.sampling.batch import BatchRequest
from grounded_diffusion.engine.sampling.denoise import denoise
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.schedule import build_schedule
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import readable_errors, replace_file

PER_FILE = 256  # images
ABOUT, FOLDER = "trajectories.json", "trajectories"
TEACHER = "dpmpp-2m"


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the teacher is to show.

    Attributes:
        timesteps: at which the student is called, from noisy to clean.
        substeps: steps of the teacher to one of the student.
        guidance_scale, guidance_interval, seed: of the teacher, see Options.

    Raises:
        UsageError: timesteps that do not fall, or less than one substep.
    """

    timesteps: tuple[int, ...] = (999, 700, 400, 130)
    substeps: int = 3
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 0.6)
    seed: int = 0

    def __post_init__(self):
        if self.substeps < 1:
            raise UsageError(f"substeps is {self.substeps}; it must be at least 1")
        if len(fine := self.teacher_timesteps) != len(set(fine)) or fine != sorted(fine, reverse=True) or fine[-1] < 0:
            raise UsageError(
                f"timesteps {', '.join(map(str, self.timesteps))} do not fall by {self.substeps} and more; "
                "give them from noisy to clean, or take fewer substeps"
            )

    @property
    def teacher_timesteps(self) -> list[int]:
        """Each of the student's timesteps, and the teacher's between it and the next."""
        ends = [*self.timesteps[1:], 0]
        cut = range(self.substeps)
        return [
            round(t + (end - t) * k / self.substeps) for t, end in zip(self.timesteps, ends, strict=True) for k in cut
        ]


class Recorder:
    """A backend that keeps the latents of every call of the network."""

    def __init__(self, backend: Backend):
        self.backend, self.latents = backend, []

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        if graph in (UNET, UNET_GROUNDED):
            self.latents.append(inputs["latents"].copy())
        return self.backend.run(graph, inputs)


def teach(pipe: GroundedPipeline, prompts: Sequence[Prompt], first: int, teaching: Teaching) -> np.ndarray:
    """Trajectories float16 [B,S+1,4,h,w] of prompts, whose images are numbered from `first`."""
    timesteps = teaching.teacher_timesteps
    scheduler = {**pipe.bundle.manifest.scheduler, "timesteps": timesteps}
    options = Options()
    size, shape = options.image_size(pipe.bundle.manifest), pipe.latent_shape(options)
    request = BatchRequest(
        build_schedule(scheduler, TEACHER, len(timesteps)),
        pipe.condition(list(prompts)),
        batch_normal([(teaching.seed, first + k) for k in range(len(prompts))], shape),
        size=size,
        guidance_scale=teaching.guidance_scale,
        guidance_interval=teaching.guidance_interval,
        capture=len(timesteps) - 1,
    )
    recorder = Recorder(pipe.backend)
    end = denoise(recorder, request).latents
    return np.stack([*recorder.latents[:: teaching.substeps], end], 1).astype(np.float16)


def make_trajectories(
    pipe: GroundedPipeline, prompts: Sequence[Prompt], teaching: Teaching, folder: Path, say: Callable[[str], None]
) -> Trajectories:
    """Make what is missing of one trajectory a prompt, and open them all.

    Raises:
        UsageError: `folder` has trajectories of another teacher, schedule or prompts, by name.
        BackendError, DiskFullError, StorageError: the same call goes on once the cause is gone.
    """
    about = {
        "teacher": pipe.bundle.manifest.base,
        **{name: getattr(teaching, name) for name in Teaching.__slots__},
        "prompts": [[prompt.text, prompt.negative_prompt or ""] for prompt in prompts],
    }
    check_about(folder, json.loads(json.dumps(about)))
    with readable_errors(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        replace_file(folder / ABOUT, json.dumps(about, ensure_ascii=False).encode())
    files, batch = [], pipe.batch_size(Options())
    for index, start in enumerate(range(0, len(prompts), PER_FILE)):
        files.append(folder / FOLDER / f"{index:06d}.npz")
        part = prompts[start : start + PER_FILE]
        if read(files[-1], len(part)) is not None:
            continue
        made = [teach(pipe, part[k : k + batch], start + k, teaching) for k in range(0, len(part), batch)]
        stream = io.BytesIO()
        np.savez(stream, latents=np.concatenate(made))
        with readable_errors(folder):
            replace_file(files[-1], stream.getbuffer())
        say(f"{start + len(part)}/{len(prompts)} trajectories")
    return Trajectories(
        np.concatenate([np.load(file)["latents"] for file in files]), [prompt.text for prompt in prompts]
    )


def check_about(folder: Path, about: dict[str, Any]) -> None:
    """Raise UsageError where a folder has trajectories of another kind; of more or fewer prompts they may be."""
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        shared = min(len(before["prompts"]), len(about["prompts"])) // PER_FILE * PER_FILE
        changed = [name for name in about if name != "prompts" and before[name] != about[name]]
        changed += ["prompts"] * (before["prompts"][:shared] != about["prompts"][:shared])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{folder / ABOUT} is damaged; remove {folder} to have all made anew") from None
    if changed:
        raise UsageError(f"{folder} has trajectories with another {', '.join(changed)}; choose another --out")


def read(file: Path, count: int) -> np.ndarray | None:
    """Trajectories of a file; None where it is not there, damaged or of another length."""
    try:
        latents = np.load(file)["latents"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    return latents if len(latents) == count else None


@dataclass(frozen=True, slots=True, eq=False)
class Trajectories:
    """All of a folder's: `latents` float16 [N,S+1,4,h,w] and N texts."""

    latents: np.ndarray
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)
