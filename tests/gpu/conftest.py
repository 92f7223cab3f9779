"""Where there is no NVIDIA GPU, nothing here is collected; `python tests/gpu/run.py` says so."""

from grounded_diffusion.kernels.cuda.device import gpu_name

collect_ignore_glob = [] if gpu_name() else ["test_*.py"]
