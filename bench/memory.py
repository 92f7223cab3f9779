"""One system in a process of its own, for its peak memory: `python -m grounded_diffusion.bench.memory REQUEST`.

`speed.peak_memory` calls this with a measurement's plan in JSON; the answer is the last line.
"""

from __future__ import annotations

import json
import sys

from grounded_diffusion.bench.environment import gpu_memory_used, peak_rss
from grounded_diffusion.bench.speed import open_named
from grounded_diffusion.bench.systems import ENGINE, label_of, make_work
from grounded_diffusion.bench.work import EngineForm, Plan
from grounded_diffusion.engine import GroundedPipeline
from grounded_diffusion.engine.backends.open import DEFAULT_BACKEND


def main() -> None:
    """Run the system named in the request and print its peak: resident bytes, or those taken of the GPU."""
    request = json.loads(sys.argv[1])
    plan, name = Plan.load(request["plan"]), request["system"]
    taken = gpu_memory_used() or 0  # by others, this process's parent among them
    ours = plan.engines[label_of(name)] if name.startswith(ENGINE) else EngineForm(DEFAULT_BACKEND, 1, 1)
    pipe = GroundedPipeline.open(request["model"], backend=ours.backend, threads=plan.threads, lanes=ours.lanes)
    system = open_named(name, pipe, plan)  # peers ask the engine for sizes only
    system.run(make_work(pipe.bundle.manifest, pipe.latent_shape(plan.options), plan.turn(name), 0))
    print(json.dumps({"peak": peak_rss() if plan.device == "cpu" else (gpu_memory_used() or 0) - taken}))


if __name__ == "__main__":
    main()
