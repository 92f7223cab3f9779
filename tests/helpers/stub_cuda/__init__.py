"""CUDA's libraries without a GPU, for the real CUDA provider of ONNX Runtime."""
