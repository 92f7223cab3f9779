"""Texts as a model's UNet takes them: tokens, context, and the queries of objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


class TextTower(nn.Module):
    """input_ids [B,77] -> context of a family's UNet.

    With one text encoder: [B,77,D], its last hidden state after the final norm. With two (SDXL): [B,78,D1+D2], both
    penultimate hidden states joined, and in a last row the second one's pooled text, padded with zeros: all that a UNet
    is told about a prompt then travels as one tensor.

    Args:
        text_encoder: the first.
        text_encoder_2: the second, or None.
        eos_token_id: of the tokenizer.
        zero_empty: whether the context of an empty text is zeros.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        eos_token_id: int = 0,
        zero_empty: bool = False,
    ):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.eos_token_id, self.zero_empty = eos_token_id, zero_empty

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.text_encoder_2 is None:
            return self.text_encoder(input_ids=input_ids).last_hidden_state
        first = self.text_encoder(input_ids=input_ids, output_hidden_states=True).hidden_states[-2]
        # The second tokenizer pads with token 0, the first with the end token: what follows the first end token.
        ended = (input_ids == self.eos_token_id).cumsum(1)
        second_ids = torch.where(ended > 1, torch.zeros_like(input_ids), input_ids)
        second = self.text_encoder_2(input_ids=second_ids, output_hidden_states=True)
        rows = torch.cat([first, second.hidden_states[-2]], -1)  # [B,77,D1+D2]
        pooled = second.text_embeds[:, None]  # [B,1,P]
        context = torch.cat([rows, nn.functional.pad(pooled, (0, rows.shape[-1] - pooled.shape[-1]))], 1)
        if self.zero_empty:
            context = context * (input_ids[:, 1] != self.eos_token_id)[:, None, None].to(context.dtype)
        return context


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [n,77], cut and padded."""
    options = dict(padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    return tokenizer(list(texts), **options).input_ids


def name_positions(tokenizer: CLIPTokenizer, template: str, name: str) -> list[int]:
    """Places, among the tokens of the filled template, of the sub-tokens of the name."""
    start = template.index("{}")
    spans = tokenizer(template.format(name), return_offsets_mapping=True)["offset_mapping"]
    return [i for i, (low, high) in enumerate(spans) if high > low and low < start + len(name) and high > start]


@torch.no_grad()
def object_queries(tower: TextTower, tokenizer: CLIPTokenizer, template: str, names: Sequence[str]) -> torch.Tensor:
    """[O,D]: the mean state over the sub-tokens of each name, in the query template."""
    contexts = tower(tokenize(tokenizer, [template.format(name) for name in names]))
    places = [name_positions(tokenizer, template, name) for name in names]
    return torch.stack([context[place].mean(0) for context, place in zip(contexts, places, strict=True)])


@torch.no_grad()
def template_states(tower: TextTower, tokenizer: CLIPTokenizer, template: str) -> torch.Tensor:
    """[T,D]: states of the begin token and of the template's words before the name; text encoders are causal."""
    words = tokenizer(template.split("{}")[0].strip()).input_ids
    ids = tokenize(tokenizer, [template.format("dog")]).to(tower.text_encoder.device)
    return tower(ids)[0, : len(words) - 1]
