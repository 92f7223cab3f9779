"""What a TensorRT plan is made of, read from its bytes: an engine can be opened on a GPU only."""


def fused_attentions(plan) -> int:
    """Attentions that a plan of TensorRT-RTX runs as one kernel each: its generated kernels keep their names."""
    return bytes(plan).count(b"Fused_multihead_attention_params_v2")
