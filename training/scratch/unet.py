"""The base model: a Stable Diffusion of our own, in diffusers' format, trained from scratch.

The text encoder learns jointly with the UNet, on latents that are encoded once beforehand.
"""

from __future__ import annotations

import json
import unicodedata
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.devices import fast_autocast
from grounded_diffusion.training.generator.model import save_base
from grounded_diffusion.training.generator.sampling import sample_images
from grounded_diffusion.training.images import save_grid
from grounded_diffusion.training.loop import step_generator, train
from grounded_diffusion.training.scratch.config import TrainConfig, table_errors
from grounded_diffusion.training.things.meanings import read_meanings
from grounded_diffusion.training.things.world import WORDS, World

CONTEXT_LENGTH = 77  # CLIP's, kept so that whatever runs this model runs Stable Diffusion 1.x
VOCABULARY = 2048
EMPTY_CAPTIONS = 0.1  # Ho and Salimans, 2022: share of unconditional training
MIN_SNR = 5.0  # Hang et al., 2023
MEANING_SCALE = 0.1  # of word embeddings that carry a meaning: large beside what training adds
# What runs without options take: fast, at a price that docs/benchmarks.md states.
RUN = {"sampler": "dpmpp-2m", "steps": 8, "guidance_scale": 7.5, "guidance_interval": [0.0, 0.6]}
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
    timestep_spacing="leading",
)


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer that knows the world's words whole, and others by the Unicode names of all pictographs."""
    common = "a photograph painting picture of and next to kind on background the with in an".split()  # noqa: SIM905
    pictographs = [unicodedata.name(chr(code), "").lower() for code in range(0x1F300, 0x1FB00)]
    return train_tokenizer([" ".join([*WORDS, *common])] * 50 + pictographs, VOCABULARY)


def knows_whole(tokenizer: CLIPTokenizer) -> bool:
    """Whether each word of the world is one token."""
    return all(len(tokenizer(word).input_ids) == 3 for word in " ".join(WORDS).split())


def train_tokenizer(corpus: list[str], size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary of at most `size` tokens, learnt from a corpus."""
    clip = CLIPTokenizer().backend_tokenizer
    draft = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    draft.normalizer, draft.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    draft.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(draft.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)])
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


@table_errors("text")
def build_text_encoder(config: TrainConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(projection_dim=128, hidden_act="quick_gelu", max_position_embeddings=CONTEXT_LENGTH) | config.text
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids, **sizes))


def place_by_meaning(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, meanings: dict[str, torch.Tensor]) -> None:
    """Start the embedding of every known word from what it means, so that like words begin alike.

    Args:
        meanings: word -> vector [d], shorter than the encoder is wide; the rest of an embedding tells words apart.

    Raises:
        UsageError: the encoder is too narrow.
    """
    table = text_encoder.get_input_embeddings().weight.data
    table.mul_(MEANING_SCALE / table.std())
    words = [word for word in meanings if len(tokenizer(word).input_ids) == 3]
    ids = torch.tensor([tokenizer(word).input_ids[1] for word in words])
    vectors = torch.stack([meanings[word] for word in words])
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    width = vectors.shape[1]
    if table.shape[1] < width + 2:
        raise UsageError(
            f"text.hidden_size is {table.shape[1]}; what words mean takes {width} of it, so at least {width + 2}"
        )
    table[ids, :width] = vectors * MEANING_SCALE * (table.shape[1] / width / 2) ** 0.5
    table[ids, width:] *= (table.shape[1] / (table.shape[1] - width) / 2) ** 0.5


@table_errors("unet")
def build_unet(config: TrainConfig, latent_size: int, text_width: int) -> UNet2DConditionModel:
    """Three levels with cross-attention on the lower two, unless the configuration says otherwise."""
    sizes = dict(block_out_channels=(48, 96, 160), layers_per_block=1, norm_num_groups=16, attention_head_dim=4)
    sizes |= dict(attention_levels=(False, True, True)) | config.unet
    attention = sizes.pop("attention_levels")
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    return UNet2DConditionModel(
        sample_size=latent_size, down_block_types=down, up_block_types=up, cross_attention_dim=text_width, **sizes
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids [B,77], padded and cut."""
    options = dict(padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    return tokenizer(texts, **options).input_ids


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, world: World, tokenizer: CLIPTokenizer, count: int, file: Path):
    """Scaled latents [count,4,h,w] in bfloat16 and token ids [count,77], made once and kept in `file`."""
    if file.exists():
        cached = torch.load(file, weights_only=True)
        return cached["latents"], cached["ids"]
    device, latents, ids = world.bank.device.type, [], []
    for chunk in range(0, count, 500):
        scene = world.render(min(500, count - chunk), step_generator(7, chunk))
        images = scene.images.contiguous(memory_format=torch.channels_last)
        with fast_autocast(device):
            mode = vae.encode(images).latent_dist.mode()
        latents.append((mode.float() * vae.config.scaling_factor).bfloat16().contiguous())
        ids.append(tokenize(tokenizer, scene.captions).short())
        if chunk % 10_000 == 0:
            print(f"encoded {chunk}/{count}", flush=True)
    latents, ids = torch.cat(latents), torch.cat(ids)
    torch.save(dict(latents=latents, ids=ids), file)
    return latents, ids


class TextToImage(torch.nn.Module):
    """UNet and text encoder, trained as one."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Latents [B,4,h,w], timesteps [B], ids [B,77] -> model output [B,4,h,w]."""
        context = self.text_encoder(ids).last_hidden_state
        return self.unet(latents, timestep, context, return_dict=False)[0]


def denoising_loss(model, scheduler: DDIMScheduler, latents, ids, generator: torch.Generator) -> torch.Tensor:
    """Velocity prediction (Salimans and Ho, 2022) with min-SNR weighting (Hang et al., 2023)."""
    device = latents.device
    noise = torch.randn(latents.shape, generator=generator).to(device)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator).to(device)
    noisy, target = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
    with fast_autocast(device.type):
        output = model(noisy.contiguous(memory_format=torch.channels_last), t, ids)
    alpha_bar = scheduler.alphas_cumprod.to(device)[t]
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=MIN_SNR) / (snr + 1)
    return (weight * (output.float() - target).square().mean(dim=(1, 2, 3))).mean() / weight.mean()


def start_models(config: TrainConfig, vae: AutoencoderKL, folder: Path):
    """Tokenizer, text encoder and UNet as training finds them: those of `config.init`, or fresh ones.

    A UNet can go on under another tokenizer; a text encoder cannot, so it is kept only where its tokenizer knows every
    word of the world. The tokenizer is then fixed in `folder/tokenizer`.
    """
    given, saved = config.init.get("unet"), folder / "tokenizer"
    old = CLIPTokenizer.from_pretrained(given, subfolder="tokenizer") if given else None
    keep = bool(old) and knows_whole(old)
    if not saved.is_dir():  # ties between rare merges fall differently every time it is learnt
        (old if keep else build_tokenizer()).save_pretrained(saved)
    tokenizer = CLIPTokenizer.from_pretrained(saved)
    if keep:
        text_encoder = CLIPTextModel.from_pretrained(given, subfolder="text_encoder").float()
    else:
        text_encoder = build_text_encoder(config, tokenizer)
        place_by_meaning(text_encoder, tokenizer, read_meanings())
    if given:
        return tokenizer, text_encoder, UNet2DConditionModel.from_pretrained(given, subfolder="unet").float()
    latent_size = config.world.size // 2 ** (len(vae.config.block_out_channels) - 1)
    return tokenizer, text_encoder, build_unet(config, latent_size, text_encoder.config.hidden_size)


def train_base(config: TrainConfig, world: World, folder: Path) -> None:
    """Train on the autoencoder in `folder/vae` and make of `folder` a model that `--base` takes, in float32."""
    stage, device = config.stages["unet"], world.bank.device
    torch.manual_seed(stage.seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device, memory_format=torch.channels_last).eval()
    tokenizer, text_encoder, unet = start_models(config, vae, folder)
    with table_errors("scheduler"):
        scheduler = DDIMScheduler(**SCHEDULER | config.scheduler)
    model = TextToImage(unet, text_encoder).to(device, memory_format=torch.channels_last)
    latents, ids = encode_scenes(vae, world, tokenizer, config.latents, folder / "latents.pt")
    empty = tokenize(tokenizer, [""]).to(device)
    run = torch.compile(model) if stage.compile else model
    prompts = [f"a photograph of a {name}" for name in config.names]

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(latents), (stage.batch,), generator=generator)
        drop = torch.rand(stage.batch, 1, generator=generator) < EMPTY_CAPTIONS
        batch_ids = torch.where(drop.to(device), empty, ids[pick].long().to(device))
        return denoising_loss(run, scheduler, latents[pick].float().to(device), batch_ids, generator)

    def sample(average: TextToImage, step: int) -> str:
        save(average)
        images, _ = sample_images(
            average.unet, average.text_encoder, tokenizer, vae, scheduler, prompts, step_generator(1, 0)
        )
        save_grid(images, folder / f"base-{step:06d}.png", columns=7)
        return f"wrote base-{step:06d}.png"

    def save(trained: TextToImage) -> None:
        parts = dict(unet=trained.unet, vae=vae, text_encoder=trained.text_encoder, tokenizer=tokenizer)
        save_base(folder, parts | dict(scheduler=scheduler, sampling=RUN))

    # On a CPU the backward pass of the fused attention costs twice that of the plain one at these sizes.
    with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
        save(train("unet", model, stage, folder, loss, sample))
