"""Tables of a base model from scratch that trains in seconds."""

SIZES = """
[world]
size = 32
[vae]
block_out_channels = [8, 16, 16]
[text]
hidden_size = 64
intermediate_size = 64
num_hidden_layers = 1
[unet]
block_out_channels = [16, 32, 32]
norm_num_groups = 8
attention_head_dim = 2
"""
