"""A head that reads cross-attention, for any small model."""


def with_attention_read(checkpoint):
    """The checkpoint with its head's weights, and random ones for what reads every cross-attention layer."""
    from dataclasses import replace

    import torch

    from grounded_diffusion.training.generator.text import template_states
    from grounded_diffusion.training.head.head import GroundingHead
    from grounded_diffusion.training.head.queried import layers_of

    torch.manual_seed(0)
    words = template_states(checkpoint.tower, checkpoint.tokenizer, checkpoint.query_template)
    config = replace(checkpoint.head.config, attention=layers_of(checkpoint.unet), words=len(words))
    head = GroundingHead(config)
    head.load_state_dict(checkpoint.head.state_dict(), strict=False)
    head.evidence.read(checkpoint.unet, words)
    torch.nn.init.normal_(head.evidence.looks.weight, std=0.1)
    return replace(checkpoint, head=head.eval().requires_grad_(False))
