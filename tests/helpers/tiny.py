"""A tiny model, random, for tests of what does not need a trained one."""

TINY_CORPUS = (
    "a photograph of a dog and a cat on a red background next to an aeroplane with a potted plant near the "
    "dining table and the tv monitor while a unicorn and a dragon look at a rocket over the sea"
)


def tiny_model():
    """A randomly initialised Stable-Diffusion-format model of three levels with a grounding head, as a Checkpoint."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from grounded_diffusion.training.checkpoint import Checkpoint
    from grounded_diffusion.training.head.head import GroundingHead, HeadConfig
    from grounded_diffusion.training.scratch.unet import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([TINY_CORPUS] * 10, 658)
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    sizes = dict(reduced_channels=(8, 16, 16), embed_dim=32, ffn_dim=64, patch=2, image_scale=4)
    coarse = GroundingHead(HeadConfig.for_unet(unet.config, **sizes))
    text_encoder = CLIPTextModel(text_config)
    head = GroundingHead(HeadConfig.for_unet(unet.config, **sizes, detail=2))  # last: no other weight hangs on it
    head.load_state_dict(coarse.state_dict(), strict=False)
    return Checkpoint(
        unet.eval(), vae.eval(), text_encoder.eval(), tokenizer, scheduler, head.eval(),
        names=dict(seen=["dog", "cat"], unseen=["unicorn"]),
        sampling=dict(sampler="dpmpp-2m", steps=20, guidance_scale=7.5, guidance_interval=[0.0, 0.6]),
    )  # fmt: skip


def smaller(checkpoint):
    """The tiny model with a UNet of two levels and its head, which is traced in half the time."""
    from dataclasses import replace

    import torch
    from diffusers import UNet2DConditionModel

    from grounded_diffusion.training.head.head import GroundingHead, HeadConfig

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sizes = dict(reduced_channels=(8, 16), embed_dim=32, ffn_dim=64, patch=2, image_scale=4, detail=2)
    head = GroundingHead(HeadConfig.for_unet(unet.config, **sizes))
    return replace(checkpoint, unet=unet.eval(), head=head.eval())
