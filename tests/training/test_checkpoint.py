"""Checkpoints: what is written is read back, diffusers reads it too, and what is broken is named."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.training.checkpoint import load_checkpoint, save_checkpoint, with_statistics
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_survives_saving_and_loading(tiny_checkpoint, tmp_path):
    first = load_checkpoint(tiny_checkpoint)
    assert first.names == dict(seen=["dog", "cat"], unseen=["unicorn"])
    assert first.capture_timestep == 1
    assert first.query_template == "a photograph of a {}"
    save_checkpoint(tmp_path / "again", first)
    second = load_checkpoint(tmp_path / "again")
    assert second.head.config == first.head.config
    for part in ("unet", "vae", "text_encoder", "head"):
        a, b = getattr(first, part).state_dict(), getattr(second, part).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in getattr(second, part).parameters())
    stored = load_file(tiny_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}


def test_diffusers_loads_a_checkpoint(tiny_checkpoint):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_checkpoint).to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a photograph of a dog", num_inference_steps=1, output_type="np").images
    assert image.shape == (64, 64, 3)


def test_a_released_head_on_a_base_model(tiny_checkpoint, tmp_path):
    unet = load_checkpoint(tiny_checkpoint).unet
    head = GroundingHead(HeadConfig.for_unet(unet.config))
    torch.save(head.state_dict(), tmp_path / "grounding_module.pth")
    loaded = load_checkpoint(tmp_path / "grounding_module.pth", tiny_checkpoint)
    assert loaded.head.config.image_scale == 4
    assert loaded.head.config.statistics == "per_image"
    assert all(torch.equal(a, b) for a, b in zip(loaded.head.parameters(), head.parameters(), strict=True))
    assert with_statistics(loaded, "stored").head.config.statistics == "stored"


def test_paths_that_do_not_go_together(tiny_checkpoint, tmp_path):
    (tmp_path / "head.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no model_index\.json"):
        load_checkpoint(tmp_path / "empty")
    with pytest.raises(UsageError, match="with --base"):
        load_checkpoint(tmp_path / "head.pth")
    with pytest.raises(UsageError, match="leave out --base"):
        load_checkpoint(tiny_checkpoint, tiny_checkpoint)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "head.pth", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="/nowhere is not a checkpoint"):
        load_checkpoint(tmp_path / "head.pth", "/nowhere")


def test_a_model_without_a_head(copy):
    shutil.rmtree(copy / "grounding_head")
    with pytest.raises(CheckpointError, match="has no grounding_head/") as error:
        load_checkpoint(copy)
    assert "--base" in one_line(error)


def test_a_model_without_a_part(copy):
    shutil.rmtree(copy / "vae")
    with pytest.raises(CheckpointError, match="it has no vae"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("unet/diffusion_pytorch_model.safetensors", ["conv_in.weight", "conv_out.bias"]),
        ("vae/diffusion_pytorch_model.safetensors", ["decoder.conv_out.weight"]),
        ("text_encoder/model.safetensors", None),
        ("grounding_head/model.safetensors", ["to_k.weight", "mlp.layers.0.bias"]),
    ],
)
def test_missing_tensors_are_listed(copy, file, keys):
    keys = keys or [next(key for key in load_file(copy / file) if key.endswith("final_layer_norm.weight"))]
    edit(copy / file, lambda tensors: [tensors.pop(key) for key in keys])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    message = one_line(error)
    assert all(key in message for key in keys)
    assert str(copy) in message


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "grounding_head/model.safetensors",
        "grounding_head/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "vae/config.json",
    ],
)
def test_damaged_files_are_named(copy, file):
    (copy / file).write_bytes(b'{"cut off')
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    assert f"cannot load {file.split('/')[0].replace('grounding_head', 'the grounding head')}" in one_line(error)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


TOKENIZERS = {
    "no file": (lambda folder: (folder / "tokenizer.json").unlink(), "knows 2 tokens, its text encoder "),
    "no merges": (
        lambda folder: edit_json(folder / "tokenizer.json", lambda t: t["model"].update(merges=[])), "in 24 tokens",
    ),
    "another end": (
        lambda folder: edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token=c["bos_token"])),
        "begins and ends a text with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_the_text_encoder_does_not_know(copy, damage):
    """It loads, and would turn prompts into tokens that mean something else."""
    harm, told = TOKENIZERS[damage]
    harm(copy / "tokenizer")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    message = one_line(error)
    assert told in message
    assert f"the tokenizer of {copy}" in message
    assert "restore the files" in message


def test_a_head_for_another_unet(copy):
    file = copy / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["cross_attention_dim"] = 48
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    one_line(error)
    file = copy / "grounding_head" / "config.json"
    about = json.loads(file.read_text())
    about["capture_timestep"] = 1000
    file.write_text(json.dumps(about))
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 32}))
    with pytest.raises(CheckpointError, match="capture_timestep is 1000"):
        load_checkpoint(copy)


class Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


def test_code_in_a_base_model_is_not_run(copy, tmp_path):
    """Old models come as pickles (.bin); those with code are refused as the head's are."""
    trace = tmp_path / "ran"
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Payload(f"touch {trace}")}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot load unet") as error:
        load_checkpoint(copy)
    one_line(error)
    assert not trace.exists()
