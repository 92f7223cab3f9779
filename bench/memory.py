"""One system in a process of its own, for its peak memory: `python -m grounded_diffusion.bench.memory REQUEST`.

`speed.peak_memory` calls this with a measurement's plan in JSON; the answer is the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grounded_diffusion.bench.speed import Plan, own_peak
from grounded_diffusion.bench.systems import open_pipeline


def main() -> None:
    """Run the system named in the request and print its peak."""
    request = json.loads(sys.argv[1])
    plan = Plan.load(request["plan"])
    pipe = open_pipeline(Path(request["model"]), plan.device, plan.threads, request["lanes"])
    print(json.dumps({"peak": own_peak(pipe, plan, request["system"])}))


if __name__ == "__main__":
    main()
