"""The runtime: prompts in, images with masks out. Never imports torch."""

from grounded_diffusion.engine.pipeline.pipeline import GroundedPipeline
from grounded_diffusion.engine.prompts.file import read_prompts
from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.sampling.options import Options
from grounded_diffusion.engine.sampling.sample import ObjectMask, Sample

__all__ = ["GroundedPipeline", "ObjectMask", "Options", "Prompt", "Sample", "read_prompts"]
