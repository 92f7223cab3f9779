"""What grounding adds to a generation, at sizes for which there may be no trained weights: random ones cost the same.

The head runs once an image. Its share is that of one run of the head in all of a generation's guided UNet calls.
Decoder and text encoder are left out, which makes the share larger than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grounded_diffusion.bench.environment import peak_rss
from grounded_diffusion.bench.flops import count_torch_flops
from grounded_diffusion.bench.timing import Timing, clock
from grounded_diffusion.errors import UsageError

SIZES = {  # arguments of UNet2DConditionModel
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "tiny": dict(
        sample_size=16, cross_attention_dim=32, attention_head_dim=4, block_out_channels=(32, 64, 64),
        layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip
STEPS = (20, 50)
OBJECTS = 2
CONTEXT = 77  # tokens of a prompt


def calls(size: str) -> dict[str, Callable[[], Any]]:
    """One guided call for one image of a size's random model: the plain UNet, the grounded one, and each form of head.

    The head is of the released layout.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from grounded_diffusion.training.head.folded import fold
    from grounded_diffusion.training.head.head import GroundingHead, HeadConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SIZES[size]).eval().requires_grad_(False)
    head = GroundingHead(HeadConfig.for_unet(unet.config)).eval().requires_grad_(False)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents, timestep = torch.randn(2, 4, side, side), torch.ones(2)
    context, queries = torch.randn(2, CONTEXT, width), torch.randn(1, OBJECTS, width)
    valid = torch.ones(1, OBJECTS, dtype=torch.bool)
    taps, folded = head.taps(unet), fold(head)
    plain = lambda: unet(latents, timestep, context)

    def grounded() -> Any:
        with taps:
            plain()
        return folded(taps.raw(), queries, valid)

    with torch.no_grad():
        grounded()  # leaves the features behind
    return {
        "UNet, plain": plain,
        "UNet, grounded": grounded,
        "head, folded": lambda: folded(taps.raw(), queries, valid),
        "head, plain": lambda: head(taps.features(), queries, valid),
    }


def measure_grounding(size: str, rounds: int, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Times on the CPU, taking turns, and operations of a guided call; shares of generations of STEPS steps.

    Raises:
        UsageError: an unknown size.
    """
    import torch

    if size not in SIZES:
        raise UsageError(f"there is no model size {size!r}; choose from {', '.join(SIZES)}")
    with torch.no_grad():
        runs = calls(size)
        flops = {name: count_torch_flops(run) for name, run in runs.items()}  # this warms up, too
        report(f"UNet {flops['UNet, plain'] / 1e9:,.1f} GFLOP a guided call, head {flops['head, folded'] / 1e9:,.1f}")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, run in runs.items():
                seconds[name].append(clock(run))
            report(f"round {number + 1}/{rounds}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()))
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    return {
        "size": size,
        "peak_memory": peak_rss(),
        "calls": {name: timing.record() | {"flops": flops[name]} for name, timing in timings.items()},
        "share_of_generation": {str(steps): shares(timings, flops, steps) for steps in STEPS},
    }


def shares(timings: dict[str, Timing], flops: dict[str, int], steps: int) -> dict[str, float]:
    """The head's part in a generation: by its own time, by the difference of the UNets' times (below 0 where that is
    within their spread), by operations."""
    plain, grounded = timings["UNet, plain"].median, timings["UNet, grounded"].median
    part = lambda head, unet: head / (steps * unet + head)
    return {
        "head_time": part(timings["head, folded"].median, plain),
        "time_difference": part(grounded - plain, plain),
        "plain_head_time": part(timings["head, plain"].median, plain),
        "flops": part(flops["head, folded"], flops["UNet, plain"]),
    }


def grounding_table(result: dict[str, Any]) -> list[str]:
    """A measurement as a Markdown table."""
    lines = [f"| {result['size']}, one guided call for one image | GFLOP | seconds | spread (IQR) |"]
    lines += ["|---|--:|--:|--:|"]
    for name, call in result["calls"].items():
        spread = Timing(tuple(call["seconds"])).spread
        lines.append(f"| {name} | {call['flops'] / 1e9:,.1f} | {call['median_s']:.3f} | {spread:.1%} |")
    lines += ["", "| grounding's share of a guided generation | " + " | ".join(map(column, STEPS)) + " |"]
    lines += ["|---|" + "--:|" * len(STEPS)]
    rows: Sequence[tuple[str, str]] = (
        ("head_time", "time of the head"),
        ("time_difference", "time of the grounded call less the plain one"),
        ("plain_head_time", "time of the head as released, not folded"),
        ("flops", "operations"),
    )
    for key, name in rows:
        values = (result["share_of_generation"][str(steps)][key] for steps in STEPS)
        lines.append(f"| {name} | " + " | ".join(f"{value:.2%}" for value in values) + " |")
    return [*lines, "", f"Peak memory: {result['peak_memory'] / 1e9:.1f} GB."]


def column(steps: int) -> str:
    """Heading of a number of steps."""
    return f"{steps} steps"
