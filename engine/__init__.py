"""The runtime: prompts in, images with masks out. Never imports torch."""

from grounded_diffusion.engine.options import Options
from grounded_diffusion.engine.pipeline import GroundedPipeline, Sample
from grounded_diffusion.engine.prompts import Prompt, read_prompts

__all__ = ["GroundedPipeline", "Options", "Prompt", "Sample", "read_prompts"]
