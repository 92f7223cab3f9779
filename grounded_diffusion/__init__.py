"""Grounded diffusion: prompts in, images with masks out."""

__version__ = "0.1.0"
