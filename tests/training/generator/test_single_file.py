"""One file of weights: the model it is, exactly as diffusers reads it; and what is wrong with other files."""

import pickle

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.families import pipeline_of, save_tiny
from helpers.original_layout import kohya_lora
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.families import FAMILIES
from grounded_diffusion.training.generator.lora import fuse
from grounded_diffusion.training.generator.model import load_base
from grounded_diffusion.training.generator.vocabulary import byte_alphabet, find_tokenizer, from_merges

ONE_OF_EACH_LAYOUT = ["sd1", "sd2", "sdxl"]


@pytest.fixture(scope="module", params=ONE_OF_EACH_LAYOUT)
def tiny(request, tmp_path_factory):
    torch.set_num_threads(1)
    parts, folder, file = save_tiny(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, parts, folder, file


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sd1"), "sd1")


def modules(parts):
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def differing(parts, other) -> list[str]:
    """Names of tensors that are not equal."""
    return [
        f"{part}.{name}"
        for part, module in modules(parts).items()
        for name, value in module.state_dict().items()
        if not torch.equal(value, other[part].state_dict()[name])
    ]


def test_a_file_is_the_model_it_was_written_from(tiny):
    name, parts, folder, file = tiny
    loaded = load_base(file, tokenizer=folder)
    assert modules(loaded).keys() == modules(parts).keys()
    assert differing(parts, loaded) == []
    assert loaded["family"] == name
    assert loaded["tokenizer"].pad_token_id == parts["tokenizer"].pad_token_id
    for part in ("unet", "vae"):
        mine, other = loaded[part].config, parts[part].config
        assert {k: v for k, v in mine.items() if not k.startswith("_") and list_(v) != list_(other[k])} == {}
    assert (
        loaded["scheduler"].config.items()
        >= {k: v for k, v in parts["scheduler"].config.items() if k[0] != "_"}.items()
    )


def list_(value):
    """Tuples as lists, and what is said once for all levels as it is said for each."""
    if isinstance(value, list | tuple):
        value = list(value)
        return value[0] if len(set(map(str, value))) == 1 else value
    return value


def test_a_folder_tells_its_family(tiny):
    name, parts, folder, _ = tiny
    loaded = load_base(folder)
    assert loaded["family"] == name
    assert differing(parts, loaded) == []


def test_diffusers_reads_the_same_from_the_file(sd1):
    """That the file is a real one: diffusers' own loader gives what ours gives."""
    _, folder, file = sd1
    theirs = StableDiffusionPipeline.from_single_file(
        file, config=str(folder), local_files_only=True, safety_checker=None
    )
    loaded = load_base(file, tokenizer=folder)
    assert differing({k: loaded[k] for k in ("unet", "vae", "text_encoder")}, theirs.components) == []


def test_a_pickle_is_read_as_tensors(sd1, tmp_path):
    parts, folder, file = sd1
    torch.save({"state_dict": load_file(file), "global_step": 1}, tmp_path / "model.ckpt")
    assert differing(parts, load_base(tmp_path / "model.ckpt", tokenizer=folder)) == []


class Trap:
    """Code in a pickle: it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_refused(tmp_path):
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "model.ckpt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="holds code beside its tensors, which is never run"):
        load_base(tmp_path / "model.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "Stable Diffusion 3, a transformer"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "FLUX"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (1,)}, "give it with --lora"),
        ({"encoder.down.0.block.0.conv1.weight": (1,)}, "give it with --vae"),
        ({"conditioner.embedders.0.model.ln_final.weight": (1,)}, "refiner of SDXL"),
        ({"something": (1,)}, "no model known here; known are Stable Diffusion 1.x"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (64, 9, 3, 3), "cond_stage_model.transformer.x": (1,)},
         "an inpainting model"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_refused_by_name(tensors, what, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=what):
        load_base(tmp_path / "file.safetensors")


def test_missing_tensors_are_listed(sd1, tmp_path):
    _, folder, file = sd1
    state = load_file(file)
    del state["model.diffusion_model.time_embed.2.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: time_embedding\.linear_2\.bias"):
        load_base(tmp_path / "part.safetensors", tokenizer=folder)


def test_a_family_is_chosen_among_those_that_look_the_same(tmp_path):
    _, folder, file = save_tiny(tmp_path, "sd2")
    turbo = load_base(file, family="sd-turbo", tokenizer=folder)
    assert turbo["scheduler"].config.timestep_spacing == "trailing"
    assert turbo["unet"].config.sample_size == 64
    with pytest.raises(CheckpointError, match="is no SDXL; its tensors are those of sd2 or sd2-base or sd-turbo"):
        load_base(file, family="sdxl", tokenizer=folder)
    with pytest.raises(UsageError, match="--family and --tokenizer are for a single file"):
        load_base(folder, family="sd-turbo")


def test_another_autoencoder(sd1, tmp_path):
    parts, folder, file = sd1
    other = {k.removeprefix("first_stage_model."): v + 1 for k, v in load_file(file).items() if "first_stage" in k}
    save_file(other, tmp_path / "vae.safetensors")
    loaded = load_base(file, tokenizer=folder, vae=tmp_path / "vae.safetensors")["vae"]
    expected = {name: value + 1 for name, value in parts["vae"].state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.scaling_factor == FAMILIES["sd1"].scaling_factor


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_loras_are_fused_as_diffusers_does(sd1, tmp_path, scale):
    pytest.importorskip("peft")
    parts, folder, _ = sd1
    kohya_lora(tmp_path / "lora.safetensors", parts)
    pipeline = pipeline_of(load_base(folder))
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    loaded = load_base(folder, loras=[(tmp_path / "lora.safetensors", scale)])
    for part in ("unet", "text_encoder"):
        ours, theirs = loaded[part].state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.items())
        assert any(not torch.equal(ours[name], value) for name, value in parts[part].state_dict().items())


def test_a_lora_in_diffusers_naming(sd1, tmp_path):
    """W + scale * B A, without alpha; also for the text encoder's attention."""
    parts, folder, _ = sd1
    names = dict(
        unet="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        text_encoder="text_model.encoder.layers.0.self_attn.q_proj",
    )
    state = {}
    for part, name in names.items():
        state[f"{part}.{name}.lora_A.weight"] = torch.randn(3, 64)
        state[f"{part}.{name}.lora_B.weight"] = torch.randn(128 if part == "unet" else 64, 3)
    save_file(state, tmp_path / "lora.safetensors")
    loaded = load_base(folder, loras=[(tmp_path / "lora.safetensors", 0.5)])
    for part, name in names.items():
        change = state[f"{part}.{name}.lora_B.weight"] @ state[f"{part}.{name}.lora_A.weight"]
        own = name.removeprefix("text_model.")
        old = parts[part].get_submodule(own).weight
        assert torch.allclose(loaded[part].get_submodule(own).weight, old + 0.5 * change, atol=1e-5)


def test_a_lora_for_another_model_changes_nothing(sd1, tmp_path):
    _, folder, _ = sd1
    other = save_tiny(tmp_path, "sdxl")[0]
    kohya_lora(tmp_path / "lora.safetensors", other)
    loaded = load_base(folder)
    before = {name: value.clone() for name, value in loaded["unet"].state_dict().items()}
    with pytest.raises(CheckpointError, match=r"is a LoRA for another model: \d+ of its \d+ layers match none"):
        fuse(tmp_path / "lora.safetensors", 1.0, loaded)
    assert all(torch.equal(value, before[name]) for name, value in loaded["unet"].state_dict().items())


def test_a_file_without_pairs_is_no_lora(sd1, tmp_path):
    save_file({"a.hada_w1_a": torch.zeros(2)}, tmp_path / "loha.safetensors")
    with pytest.raises(CheckpointError, match=r"it has tensors such as a\.hada_w1_a"):
        load_base(sd1[1], loras=[(tmp_path / "loha.safetensors", 1.0)])
    with pytest.raises(CheckpointError, match="there is no LoRA at"):
        load_base(sd1[1], loras=[(tmp_path / "nowhere.safetensors", 1.0)])


def test_the_tokenizer_comes_from_a_place_that_is_named(sd1, tmp_path, monkeypatch):
    _, folder, file = sd1
    assert len(find_tokenizer(folder)) == len(find_tokenizer(folder / "tokenizer"))
    with pytest.raises(CheckpointError, match="cannot load a tokenizer from"):
        find_tokenizer(tmp_path)
    monkeypatch.setattr("grounded_diffusion.training.generator.vocabulary.PACKAGES", ())
    monkeypatch.setattr("grounded_diffusion.training.generator.vocabulary.HUB", {})
    with pytest.raises(CheckpointError, match=r"does not hold CLIP's vocabulary.*--tokenizer.*pip install"):
        load_base(file)


def test_a_short_list_of_byte_pairs_is_refused(tmp_path):
    (tmp_path / "bpe.txt").write_text("#version\na b\nc d\n")
    with pytest.raises(CheckpointError, match="has 2 byte pairs"):
        from_merges(tmp_path / "bpe.txt")
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_lora_may_say_how_its_model_is_run(sd1, tmp_path):
    parts, folder, _ = sd1
    kohya_lora(tmp_path / "plain.safetensors", parts)
    tensors, file = load_file(tmp_path / "plain.safetensors"), tmp_path / "student.safetensors"
    save_file(tensors, file, {"sampler": "ddim", "timesteps": "999,700,130", "guidance_scale": "1"})
    loaded = load_base(folder, loras=[(file, 1.0)])
    assert loaded["sampling"] == {"sampler": "ddim", "steps": 3, "guidance_scale": 1.0}
    assert loaded["scheduler"].config.timesteps == [999, 700, 130]
    assert not load_base(folder, loras=[(tmp_path / "plain.safetensors", 1.0)])["sampling"]
    save_file(tensors, file, {"sampler": "ddim", "timesteps": "many", "guidance_scale": "1"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_base(folder, loras=[(file, 1.0)])
