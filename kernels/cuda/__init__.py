"""The operations on an NVIDIA GPU: compiled by nvcc or NVRTC, launched on device pointers."""
