"""Hot operations around the networks: host loops, CUDA kernels of the same arithmetic, and their references."""

from grounded_diffusion.kernels.cfg_step import StepCoefficients, cfg_step
from grounded_diffusion.kernels.image_epilogue import image_epilogue
from grounded_diffusion.kernels.mask_epilogue import MaskResult, mask_epilogue

__all__ = ["MaskResult", "StepCoefficients", "cfg_step", "image_epilogue", "mask_epilogue"]
