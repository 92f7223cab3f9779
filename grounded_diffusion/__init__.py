"""Grounded diffusion: prompts in, images with masks out."""

from pkgutil import extend_path

# Started inside a source checkout, Python finds this folder first; its sibling packages are in the installed one.
__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"
