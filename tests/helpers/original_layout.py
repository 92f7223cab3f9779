"""Models written as one file, in the layout of the original Stable Diffusion code, and LoRA files in kohya's."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def unet_key(key: str, layers: int, attends: list[bool]) -> str:
    """A key of diffusers' UNet in the original layout; `attends`: whether each up block has attention."""
    for new, old in ENDS.items():
        if key.startswith(f"{new}."):
            return old + key[len(new) :]
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, i, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}.{resnet(rest, kind)}"
    side, block, kind, i, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    block, i = int(block), int(i)
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.{rest}"
    at = 1 + block * (layers + 1) + i if side == "down" else block * (layers + 1) + i
    place = "input_blocks" if side == "down" else "output_blocks"
    return f"{place}.{at}.{0 if kind == 'resnets' else 1}.{resnet(rest, kind)}"


def resnet(rest: str, kind: str) -> str:
    """The inside of a block."""
    if kind == "attentions":
        return rest
    layer, _, tail = rest.partition(".")
    return f"{RESNET[layer]}.{tail}"


def vae_key(key: str, levels: int) -> str:
    """A key of diffusers' autoencoder in the original layout."""
    key = re.sub(r"(encoder|decoder)\.mid_block\.resnets\.(\d)", lambda m: f"{m[1]}.mid.block_{int(m[2]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = key.replace("conv_shortcut", "nin_shortcut").replace("group_norm", "norm").replace("to_out.0", "proj_out")
    return re.sub(r"\.to_([qkv])\.", r".\1.", key)


def open_clip(state: dict[str, torch.Tensor], extra_layer: bool) -> dict[str, torch.Tensor]:
    """A text encoder in OpenCLIP's layout; `extra_layer` repeats the last layer, which is not run."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    layers = 1 + max(int(m[1]) for key in state if (m := re.match(r"encoder\.layers\.(\d+)\.", key)))
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    width = state["final_layer_norm.weight"].shape[0]
    result["text_projection"] = state.get("text_projection.weight", torch.eye(width)).T.contiguous()
    for i in range(layers + extra_layer):
        get = lambda name: state[f"encoder.layers.{min(i, layers - 1)}.{name}"]  # noqa: B023
        block = f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            result[f"{block}.attn.in_proj_{kind}"] = torch.cat([get(f"self_attn.{x}_proj.{kind}") for x in "qkv"])
            for new, old in (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")):  # fmt: skip
                result[f"{block}.{old}.{kind}"] = get(f"{new}.{kind}")
    return result


def original(parts: dict, family) -> dict[str, torch.Tensor]:
    """All tensors of a model in the original layout."""
    unet, vae, result = parts["unet"], parts["vae"], {}
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    for key, value in unet.state_dict().items():
        result[f"model.diffusion_model.{unet_key(key, unet.config.layers_per_block, attends)}"] = value
    for key, value in vae.state_dict().items():
        old = vae_key(key, len(vae.config.block_out_channels))
        result[f"first_stage_model.{old}"] = value[..., None, None] if "attn_1" in old and value.ndim == 2 else value
    for number, tower in enumerate(family.text):
        state = parts["text_encoder" + ("_2" if number else "")].state_dict()
        if tower.open_clip:
            state = open_clip(state, extra_layer=not tower.penultimate)
        else:
            state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        result |= {f"{tower.prefix}{key}": value for key, value in state.items()}
    return {key: value.contiguous().clone() for key, value in result.items()}


def kohya_lora(path, parts: dict, rank: int = 2, alpha: float = 1.0, seed: int = 0) -> None:
    """A LoRA of random pairs for the UNet's attention and feed-forward and the text encoder's feed-forward.

    Not for the text encoder's attention: diffusers 0.42 drops that silently beside transformers 5.23.
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for prefix, module in (("lora_unet_", parts["unet"]), ("lora_te_text_model_", parts["text_encoder"])):
        for name, layer in module.named_modules():
            if not name.endswith(("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "fc1")):
                continue
            out, into, *kernel = layer.weight.shape
            key = prefix + name.removeprefix("text_model.").replace(".", "_")
            state[f"{key}.lora_down.weight"] = torch.randn(rank, into, *kernel, generator=generator)
            state[f"{key}.lora_up.weight"] = torch.randn(out, rank, *kernel, generator=generator) * 0.05
            state[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
