"""Everything that decides a run. The command line makes one, Python makes one, Ray's workers are sent one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND, check_precision
from grounded_diffusion.engine.checks import check_float, check_int
from grounded_diffusion.engine.dataset.formats import WITHOUT_SPLITS, FormatOptions, open_format
from grounded_diffusion.engine.prompts.file import STANDARD_INPUT
from grounded_diffusion.engine.prompts.prompt import Prompt, to_line
from grounded_diffusion.engine.runs.filters import Filters
from grounded_diffusion.engine.runs.metrics import parse_address
from grounded_diffusion.engine.runs.plan import MAX_ATTEMPTS, MAX_SHARD
from grounded_diffusion.engine.runs.share import Share, parse_shard
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.errors import UsageError

ATTEMPTS = 4
MAX_LANES, MAX_THREADS, MAX_WORKERS = 64, 1024, 100_000
MAX_DEVICE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What to make, how, and where to. What decides the bytes is written to run.json, and a second run into the same
    output must agree with it.

    Attributes:
        out: folder to write to, or a URL such as "s3://bucket/name".
        prompts: what to draw: strings with the objects in brackets, JSON lines or Prompt objects.
        prompt_file: a file of such lines, "-" for standard input; its prompts come first.
        skip_bad_lines: leave out lines of `prompt_file` that cannot be used, and say which.
        model: a bundle that gd-export wrote; None takes the shipped model.
        options: how to draw: sampler, steps, guidance, size, seed, images of each prompt, batch.
        format: one of FORMATS.
        format_options: class names, JPEG or PNG, void pixels.
        filters: which samples to refuse.
        val: share of every class that is kept for validation, between 0 and 1; None has no split. A sample's split
            depends on those before it alone, so that a data set that grows keeps it.
        random_seed: draw the seed instead of taking that of `options`; a run that was begun goes on with its own.
        attempts: noises to try for a sample that fails or is refused.
        backend: one of BACKENDS.
        device: number of the GPU, of those that CUDA_VISIBLE_DEVICES leaves; None takes the first or, where a launcher
            has set LOCAL_RANK or SLURM_LOCALID, that one, so that the processes of a machine share its GPUs out.
        precision: "fp32" or "bf16" has this machine's CPU compute in it, "fastest" in whatever is fastest here; a
            backend is chosen by it, and a run that was begun goes on with its own. None leaves that to `backend`.
        threads: CPU threads; None takes all cores.
        lanes: batches at once on the CPU; None takes what is fastest on this machine.
        shard_size: samples of a shard; None takes 16 batches or more.
        shard: make only the shards of one worker of several: Share(2, 8), "2/8", or "auto" to ask the scheduler that
            has started this process. None makes whatever shard nobody else is on.
        ray: hand the shards to Ray's workers: the address of a cluster, "" to start one on this machine.
        workers: of Ray; None takes one a GPU for a backend on a GPU, else one for every `threads` cores.
        overwrite: remove another run that is in `out`, and only what its records name. This very run goes on.
        log: file to append a structured log to, one JSON object a line.
        metrics_file: file to keep in Prometheus' text format.
        metrics_port: port at which to serve metrics, or "HOST:PORT".

    Raises:
        UsageError: a field outside its range, or two that exclude each other, at construction.
    """

    out: str | Path
    prompts: str | Prompt | tuple[str | Prompt, ...] | list[str | Prompt] = ()
    prompt_file: str | Path | None = None
    skip_bad_lines: bool = False
    model: str | Path | None = None
    options: Options = field(default_factory=Options)
    format: str = "folder"
    format_options: FormatOptions = field(default_factory=FormatOptions)
    filters: Filters = field(default_factory=Filters)
    random_seed: bool = False
    attempts: int = ATTEMPTS
    backend: str = DEFAULT_BACKEND
    device: int | None = None
    precision: str | None = None
    threads: int | None = None
    lanes: int | None = None
    val: float | None = None
    shard_size: int | None = None
    shard: Share | str | None = None
    ray: str | None = None
    workers: int | None = None
    overwrite: bool = False
    log: str | Path | None = None
    metrics_file: str | Path | None = None
    metrics_port: str | int | None = None

    def __post_init__(self) -> None:
        prompts = [self.prompts] if isinstance(self.prompts, str | Prompt) else self.prompts
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str | Prompt):
                raise UsageError(f"prompt {number} must be a string or a Prompt, not {type(prompt).__name__}")
        self._set("prompts", tuple(to_line(prompt) if isinstance(prompt, Prompt) else prompt for prompt in prompts))
        for name in ("prompt_file", "model", "log", "metrics_file"):
            if isinstance(path := getattr(self, name), str):
                self._set(name, Path(path))
        if isinstance(self.shard, str):
            self._set("shard", parse_shard(self.shard) if self.shard else None)
        self._check()

    @property
    def lines(self) -> tuple[str, ...]:
        """`prompts`, as lines of a prompt file."""
        return cast(tuple[str, ...], self.prompts)

    @property
    def share(self) -> Share | None:
        """`shard`, once it is read."""
        return cast("Share | None", self.shard)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check(self) -> None:
        """Raise UsageError for what no model and no prompt can make right."""
        if not self.prompts and self.prompt_file is None:
            raise UsageError("no prompts; give `prompt_file` or `prompts`", "prompt_file", "prompts")
        limits = {"attempts": MAX_ATTEMPTS, "threads": MAX_THREADS, "lanes": MAX_LANES, "shard_size": MAX_SHARD,
                  "workers": MAX_WORKERS}  # fmt: skip
        for name, most in limits.items():
            if (value := getattr(self, name)) is not None:
                check_int(value, name, 1, most)
        if self.backend not in BACKENDS:
            raise UsageError(f"there is no backend {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        if self.device is not None:
            check_int(self.device, "device", 0, MAX_DEVICE)
            if BACKENDS[self.backend].device == "cpu" or self.ray is not None:
                raise UsageError("device is for a backend on a GPU, in this process", "device", "backend", "ray")
        if self.precision is not None:
            check_precision(self.precision)
            if self.backend != DEFAULT_BACKEND:
                raise UsageError("give `backend` or `precision`, not both", "backend", "precision")
        if self.workers is not None and self.ray is None:
            raise UsageError("workers is for ray; give threads for the threads of this process",
                             "workers", "ray", "threads")  # fmt: skip
        if self.ray is not None and self.prompt_file == STANDARD_INPUT:
            raise UsageError("Ray's workers have no standard input; give `prompt_file` a file", "prompt_file", "ray")
        if self.overwrite and self.share and self.share.count > 1:
            raise UsageError(
                "overwrite with shard would remove what other workers make; remove the output first",
                "overwrite", "shard",
            )  # fmt: skip
        if self.val is not None:
            check_share(self.val, self.format)
        if self.metrics_port is not None:
            parse_address(self.metrics_port)
        self.format_options.classes(self.format)  # raises for names that cannot be read, or that nobody would look at
        open_format(self.format, self.format_options.settings(self.format))


def check_share(val: float, format: str) -> None:
    """Raise UsageError where a run cannot have this share of val, or its format no split."""
    check_float(val, "val", 0, 1)
    if not 0 < val < 1:
        raise UsageError(f"`val` must lie between 0 and 1, as in 0.1, not {val:g}", "val")
    if format in WITHOUT_SPLITS:
        raise UsageError(f"{format} has no split into train and val; leave `val` out", "val")
