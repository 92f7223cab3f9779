"""Batches of examples: which, with what noise, and as tensors. The same at any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.grounding.store import Example, ExampleSet


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B examples as the head is trained on them.

    Attributes:
        latents: float32 [B,4,h,w].
        timesteps: float32 [B].
        prompts: B texts.
        names: name indices int64 [B,O], 0 where there is none.
        valid: bool [B,O].
        masks: bool [B,O,H,W].
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompts: list[str]
    names: torch.Tensor
    valid: torch.Tensor
    masks: torch.Tensor


class Pool:
    """Examples of several folders as one list.

    Raises:
        UsageError: folders of different sizes of image, or made by different models.
    """

    def __init__(self, sets: Sequence[ExampleSet]):
        self.sets = list(sets)
        self.places = [(one, k) for one in self.sets for k in range(len(one))]
        first = self.sets[0]
        shape = first[0].latents.shape, first[0].masks.shape[1:]
        for other in self.sets[1:]:
            if (other[0].latents.shape, other[0].masks.shape[1:]) != shape:
                raise UsageError(f"{first.folder} and {other.folder} have images of different sizes; train on one size")
            if other.about.base != first.about.base:
                raise UsageError(f"{first.folder} and {other.folder} were made by different models; train on one's")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, k: int) -> Example:
        one, index = self.places[k]
        return one[index]

    def names(self, k: int) -> tuple[str, ...]:
        one, index = self.places[k]
        return one.names(index)


def inputs_of(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network is called with for these examples: latents [B,4,h,w] and timesteps [B], float32."""
    latents = torch.stack([torch.from_numpy(example.latents) for example in examples])
    return latents, torch.tensor([example.timestep for example in examples])


def collate(examples: Sequence[Example], index: dict[str, int]) -> Batch:
    """Examples as a batch, padded to the most objects; `index` numbers the names."""
    most = max(len(example.names) for example in examples)
    names = torch.zeros(len(examples), most, dtype=torch.long)
    valid = torch.zeros(len(examples), most, dtype=torch.bool)
    masks = torch.zeros(len(examples), most, *examples[0].masks.shape[1:], dtype=torch.bool)
    for b, example in enumerate(examples):
        for o, name in enumerate(example.names):
            names[b, o], valid[b, o] = index[name], True
            masks[b, o] = torch.from_numpy(example.masks[o])
    latents, timesteps = inputs_of(examples)
    return Batch(latents, timesteps, [example.prompt for example in examples], names, valid, masks)


def renoise(batch: Batch, scheduler, noise_range: int, generator: torch.Generator) -> Batch:
    """Half of the examples as they are, the others noised up to `noise_range` (scheduler: a diffusers scheduler)."""
    count = len(batch.prompts)
    timesteps = torch.randint(1, noise_range + 1, (count,), generator=generator)
    kept = torch.rand(count, generator=generator) < 0.5
    noise = torch.randn(batch.latents.shape, generator=generator)
    alpha = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise
    latents = torch.where(kept[:, None, None, None], batch.latents, noisy)
    timesteps = torch.where(kept, batch.timesteps, timesteps.float())
    return Batch(latents, timesteps, batch.prompts, batch.names, batch.valid, batch.masks)


def share(batch: Batch, rank: int, processes: int) -> Batch:
    """The rows of one process of several."""
    size = len(batch.prompts) // processes
    rows = slice(rank * size, (rank + 1) * size)
    return Batch(
        batch.latents[rows], batch.timesteps[rows], batch.prompts[rows], batch.names[rows], batch.valid[rows],
        batch.masks[rows],
    )  # fmt: skip
