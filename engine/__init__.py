"""The runtime: prompts in, images with masks out. Never imports torch.


Names are loaded when they are first used, so that a command which needs no model loads none.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grounded_diffusion.engine.dataset.formats.options import FormatOptions
    from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
    from grounded_diffusion.engine.prompts.file import read_prompts
    from grounded_diffusion.engine.prompts.prompt import Prompt
    from grounded_diffusion.engine.runs.config import RunConfig
    from grounded_diffusion.engine.runs.filters import Filters
    from grounded_diffusion.engine.runs.make import DatasetResult, make_dataset
    from grounded_diffusion.engine.runs.progress import Progress
    from grounded_diffusion.engine.sampling.options import Options
    from grounded_diffusion.engine.sampling.sample import ObjectMask, Sample

__all__ = [
    "DatasetResult", "Filters", "FormatOptions", "GroundedPipeline", "ObjectMask", "Options", "Progress", "Prompt",
    "RunConfig", "Sample", "make_dataset", "read_prompts",
]  # fmt: skip
PLACES = {
    "dataset.formats.options": ("FormatOptions",),
    "pipeline.pipeline": ("GroundedPipeline",),
    "prompts.file": ("read_prompts",),
    "prompts.prompt": ("Prompt",),
    "runs.config": ("RunConfig",),
    "runs.filters": ("Filters",),
    "runs.make": ("DatasetResult", "make_dataset"),
    "runs.progress": ("Progress",),
    "sampling.options": ("Options",),
    "sampling.sample": ("ObjectMask", "Sample"),
}


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
