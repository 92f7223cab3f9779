"""An NVIDIA GPU of host memory: the kernels on fibers, and a driver that cuda-core takes for a real one."""
