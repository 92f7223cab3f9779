"""Grounded diffusion: prompts in, images with masks out."""

import os
from pkgutil import extend_path

# Started inside a source checkout, Python finds this folder first; its sibling packages are in the installed one.
__path__ = extend_path(__path__, __name__)
__version__ = "0.1.0"

# Nothing is sent home, unless the user's own environment asks for it. ONNX Runtime reads its variable when it is
# imported, and makes a device id then: `onnxruntime.disable_telemetry_events()` comes too late. Ray and the hub's
# library read theirs when they are used. The processes that are started from here inherit all three.
_QUIET = {"ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update({name: os.environ.get(name) or value for name, value in _QUIET.items()})
