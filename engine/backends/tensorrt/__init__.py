"""TensorRT's engines as files."""
