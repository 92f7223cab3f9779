"""The runtime: prompts in, images with masks out. Never imports torch.

The names below are loaded when they are asked for, so that a command that makes no images loads no pipeline.
"""

from importlib import import_module
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
_HOMES = {
    "DatasetResult": "runs.make",
    "Filters": "runs.filters",
    "FormatOptions": "dataset.formats.options",
    "GroundedPipeline": "pipeline.pipeline",
    "ObjectMask": "sampling.sample",
    "Options": "sampling.options",
    "Progress": "runs.progress",
    "Prompt": "prompts.prompt",
    "RunConfig": "runs.config",
    "Sample": "sampling.sample",
    "make_dataset": "runs.make",
    "read_prompts": "prompts.file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
