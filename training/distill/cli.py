"""gd-train distill: a student of few steps from any Stable Diffusion model."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.prompts.file import read_prompts
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import local_path

EXAMPLES = """\
examples:
  gd-prompts --vocabulary voc --count 20000 --out prompts.txt
  gd-train distill --base sd15/ --model bundle/ --prompts prompts.txt --out student/
  gd-export --ckpt checkpoint/ --lora student/student.safetensors --out fast-bundle/

The same command given again goes on where it was.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What gd-train distill takes."""
    parser.add_argument("--base", required=True, metavar="MODEL", help="Stable Diffusion: a directory or a hub name")
    parser.add_argument(
        "--model", type=local_path, required=True, metavar="BUNDLE", help="the same model exported: the teacher"
    )
    parser.add_argument("--prompts", type=local_path, required=True, metavar="FILE", help="as gd-infer takes it")
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder to write")
    group = parser.add_argument_group("teacher")
    group.add_argument(
        "--timesteps", default="999,700,400,130", metavar="T,T,...",
        help="at which the student is called; masks are read at the last (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--substeps", type=int, default=3, metavar="N", help="teacher's steps to one of them (3)")
    group.add_argument("--guidance-scale", type=float, default=7.5, metavar="W", help="what is distilled (7.5)")
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 0.6),
        metavar=("A", "B"),
        help="as in gd-infer (0 0.6)",
    )
    group.add_argument("--backend", choices=BACKENDS, default=DEFAULT_BACKEND)
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    group = parser.add_argument_group("student")
    group.add_argument("--iterations", type=int, default=4000, metavar="N", help="steps of training (4000)")
    group.add_argument("--batch", type=int, default=32, metavar="N", help="calls of the student to a step (32)")
    group.add_argument("--rank", type=int, default=32, metavar="N", help="of the LoRA (32)")
    group.add_argument("--lr", type=float, default=1e-3, metavar="X", help="full learning rate (0.001)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is mixed (fp32)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def timesteps_of(text: str) -> tuple[int, ...]:
    """The numbers of --timesteps. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--timesteps {text!r} must be whole numbers with commas, such as 999,700,400,130") from None


def distill(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """gd-train distill."""
    prompts = read_prompts(args.prompts)
    timesteps = timesteps_of(args.timesteps)

    import torch

    from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
    from grounded_diffusion.training.distill.student import StudentConfig, train_student
    from grounded_diffusion.training.distill.trajectories import Teaching, make_trajectories
    from grounded_diffusion.training.generator.base import FrozenBase
    from grounded_diffusion.training.loop import StageConfig

    interval = tuple(args.guidance_interval)
    teaching = Teaching(timesteps, args.substeps, args.guidance_scale, interval, args.seed)
    stage = StageConfig(
        steps=args.iterations, batch=args.batch, lr=args.lr, muon_lr=0.0, cooldown=0.7, seed=args.seed,
        sample_every=500, save_every=250,
    )  # fmt: skip
    config = StudentConfig(stage, args.rank, args.precision)
    if args.threads:
        torch.set_num_threads(args.threads)
    base = FrozenBase(args.base, args.device)
    with GroundedPipeline.open(args.model, backend=args.backend, threads=args.threads) as pipe:
        if pipe.bundle.manifest.base != base.digest:
            raise UsageError(f"{args.model} was not exported from {args.base}; give the model that it was made from")
        trajectories = make_trajectories(pipe, prompts, teaching, args.out, say)
    measured = train_student(base, trajectories, timesteps, config, args.out, say)
    print(f"distance from the teacher's images {measured['error']:.2%}, without training {measured['untrained']:.2%}")
