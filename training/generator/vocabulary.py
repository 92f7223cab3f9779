"""CLIP's tokenizer: where its vocabulary of 49,408 tokens is taken from. A file of weights never holds it."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import CLIPTokenizer

from grounded_diffusion.errors import CheckpointError

MERGES = 49_152 - 256 - 2  # CLIP's list of merges is longer than what its vocabulary uses (Radford et al. 2021)
CONTEXT_LENGTH = 77
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")  # that carry BPE_FILE; they are not imported
HUB = {  # looked up in the cache only
    "openai/clip-vit-large-patch14": "vocab.json",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tokenizer/vocab.json",
    "stabilityai/stable-diffusion-xl-base-1.0": "tokenizer/vocab.json",
}
HOW = "give it with --tokenizer (a tokenizer's folder, or CLIP's bpe_simple_vocab_16e6.txt.gz)"


def from_merges(path: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from the file of byte pairs that OpenAI released. Raises CheckpointError."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8").split("\n")[1 : MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line)]
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not CLIP's list of byte pairs ({error}); {HOW}") from None
    if len(merges) != MERGES:
        raise CheckpointError(f"{path} has {len(merges)} byte pairs, CLIP's list has {MERGES} and more; {HOW}")
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def byte_alphabet() -> list[str]:
    """The 256 letters that stand for bytes, in CLIP's order: printable bytes as themselves, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def from_place(path: Path) -> CLIPTokenizer:
    """A tokenizer from a folder (of its own, or of a model) or from a file of byte pairs. Raises CheckpointError."""
    if path.is_file():
        return from_merges(path)
    try:
        folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise OSError("no tokenizer.json and no vocab.json in it")
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"cannot load a tokenizer from {path} ({str(error).splitlines()[0]}); {HOW}") from None


def find_tokenizer(path: str | Path | None = None) -> CLIPTokenizer:
    """CLIP's tokenizer: what `path` holds; else what this machine has of it already. Nothing is fetched.

    Args:
        path: a tokenizer's folder, a model's folder that has tokenizer/, or CLIP's list of byte pairs (.txt or .gz).

    Raises:
        CheckpointError: not there, or not a tokenizer.
    """
    if path is not None:
        return from_place(Path(path))
    for name, file in HUB.items():
        if isinstance(known := try_to_load_from_cache(name, file), str):
            return from_place(Path(known).parent)
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / BPE_FILE).is_file():
                return from_merges(Path(folder) / BPE_FILE)
    raise CheckpointError(
        f"a single file does not hold CLIP's vocabulary, and it is not on this machine; {HOW}, "
        "or pip install --no-deps open-clip-torch, which has it"
    )
