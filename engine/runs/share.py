"""Which shards are whose, when many machines make one data set.

The rule: worker i of N (i from 0) makes the shards s with s mod N = i. It needs no talk between the workers. A task
that died is started again with the same command: it makes what is missing of its shards. Another N, or two workers with
the same i, do no harm either: what is finished stays finished, and claims keep workers apart. Without any of this,
every worker on the same output makes whatever shard nobody has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from grounded_diffusion.errors import UsageError

KUBERNETES_TOTAL = "GD_COMPLETIONS"  # Kubernetes tells a pod its index, not how many there are: the manifest does
SCHEDULERS = "Slurm arrays and tasks, Kubernetes Indexed Jobs, torchrun"


@dataclass(frozen=True, slots=True)
class Share:
    """Worker `index` of `count`.

    Attributes:
        index: from 0.
        source: where it was read, for messages.

    Raises:
        UsageError: an index that is not below the count.
    """

    index: int = 0
    count: int = 1
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise UsageError(
                f"worker {self.index} of {self.count}{self.source and f' ({self.source})'} does not exist; "
                f"workers count from 0 to {max(self.count - 1, 0)}",
                "shard",
            )

    def __str__(self) -> str:
        return f"worker {self.index} of {self.count}"

    def shards(self, total: int) -> range:
        """The shards of 0..total-1 that are this worker's."""
        return range(self.index, total, self.count)


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Share:
    """ "2/8" is worker 2 of 8, counted from 0; "auto" asks the environment. Raises UsageError."""
    if text == "auto":
        worker = shard_of_environment(environment)
        if worker is None:
            raise UsageError(f"shard auto finds no scheduler here (it knows {SCHEDULERS}); give shard I/N", "shard")
        return worker
    if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
        raise UsageError(f"shard takes I/N with I from 0 to N-1, as in 0/4, or auto; not {text!r}", "shard")
    return Share(int(match[1]), int(match[2]), "shard")


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> Share | None:
    """Which worker this process is, as its scheduler says; None outside of one. Raises UsageError for half an answer.

    Torchrun comes first, as it runs inside of the others' jobs; a Slurm array whose jobs each run several tasks has as
    many workers as there are jobs times tasks. Sources: https://slurm.schedmd.com/job_array.html and srun.html,
    https://kubernetes.io/docs/concepts/workloads/controllers/job/#completion-mode,
    https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return Share(number(environment, "RANK"), number(environment, "WORLD_SIZE"), "torchrun")
    if "SLURM_JOB_ID" in environment:
        return shard_of_slurm(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        if KUBERNETES_TOTAL not in environment:
            raise UsageError(
                f"Kubernetes gives this pod an index but not their number; set {KUBERNETES_TOTAL} to the Job's "
                f"completions in its manifest, or give shard",
                "shard",
            )
        total = number(environment, KUBERNETES_TOTAL)
        return Share(number(environment, "JOB_COMPLETION_INDEX"), total, "Kubernetes Indexed Job")
    return None


def shard_of_slurm(environment: Mapping[str, str]) -> Share | None:
    """The worker of a Slurm array's job, of a task of srun, or of both. None in a plain batch job."""
    index, count, sources = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environment:
        task, low, high, step, count = (
            number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "STEP", "COUNT")
        )
        if count != (high - low) // step + 1:
            raise UsageError(
                f"the job array's numbers are not evenly spaced ({count} from {low} to {high} by {step}); "
                "submit a range, as in --array=0-7, or give shard",
                "shard",
            )
        index, sources = (task - low) // step, ["Slurm array"]
    if "SLURM_STEP_NUM_TASKS" in environment:  # srun sets it; SLURM_PROCID and SLURM_NTASKS are in batch scripts too
        tasks = number(environment, "SLURM_STEP_NUM_TASKS")
        index, count = index * tasks + number(environment, "SLURM_PROCID"), count * tasks
        sources += ["srun"]
    return Share(index, count, " and ".join(sources)) if sources else None


def number(environment: Mapping[str, str], name: str) -> int:
    """A variable as a whole number. Raises UsageError."""
    value = environment.get(name)
    if value is None or not re.fullmatch(r"-?\d{1,9}", value):
        raise UsageError(f"{name} should be a whole number here, but is {value!r}; give shard I/N instead", "shard")
    return int(value)
