"""The runtime: prompts in, images with masks out. Never imports torch."""

from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline, Sample
from grounded_diffusion.engine.prompts.prompt import Prompt, read_prompts
from grounded_diffusion.engine.sampling.options import Options

__all__ = ["GroundedPipeline", "Options", "Prompt", "Sample", "read_prompts"]
