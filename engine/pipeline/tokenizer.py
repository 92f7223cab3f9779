"""From words to token ids, and to the place of an object's name among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grounded_diffusion.bundle import TOKENIZER, Bundle
from grounded_diffusion.engine.checks import shorten
from grounded_diffusion.errors import BundleError, UsageError


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as the text encoder takes it.

    Attributes:
        ids: int64 [context_length]: begin, words, end, padding.
        spans: (start, end) characters of the word tokens; that of ids[i] is spans[i - 1].
        dropped: the words that do not fit and are not seen by the model.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    dropped: tuple[str, ...]


class Tokenizer:
    """The bundle's tokenizer. Special tokens and lengths come from the manifest, not from the tokenizer's file."""

    def __init__(self, bundle: Bundle):
        from tokenizers import Tokenizer as HuggingFaceTokenizer  # here, so that importing the engine stays light

        self.manifest = bundle.manifest
        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(bundle.file(TOKENIZER)))
        except Exception as error:  # the binding raises bare Exception
            raise BundleError(f"{bundle.file(TOKENIZER)} is not a tokenizer ({error}); run gd-export again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> Tokens:
        """Token ids of a text, cut and padded to the model's context length."""
        manifest = self.manifest
        words = self._tokenizer.encode(text, add_special_tokens=False)
        room = manifest.context_length - 2  # begin and end
        kept, spans = words.ids[:room], tuple(words.offsets[:room])
        ids = np.full(manifest.context_length, manifest.pad_token_id, np.int64)
        ids[: len(kept) + 2] = [manifest.bos_token_id, *kept, manifest.eos_token_id]
        dropped = tuple(text[words.offsets[room][0] :].split()) if len(words.ids) > room else ()
        return Tokens(ids, spans, dropped)

    def what_is_cut(self, text: str) -> str | None:
        """What to tell of a prompt that is too long for the model; None for one that fits."""
        if not (dropped := self.encode(text).dropped):
            return None
        return (
            f"the prompt {shorten(text)!r} is over {self.manifest.context_length} tokens; the model does not see its "
            f"end: {shorten(' '.join(dropped), 200)!r}"
        )

    def encode_query(self, name: str) -> tuple[Tokens, tuple[int, ...]]:
        """An object's query text, and the positions in its ids of the sub-tokens of the name.

        Raises:
            UsageError: the name has no tokens, or too many.
        """
        before, after = self.manifest.query_template.split("{}")
        tokens = self.encode(before + name + after)
        start, end = len(before), len(before) + len(name)
        if tokens.dropped:
            raise UsageError(f"object name {name!r} is too long for the model's {self.manifest.context_length} tokens")
        positions = tuple(i + 1 for i, (low, high) in enumerate(tokens.spans) if low < end and high > start)
        if not positions:
            raise UsageError(f"object name {name!r} has no letters that the model's tokenizer knows")
        return tokens, positions
