"""Text embeddings: prompts to context, object names to queries; every text is encoded once and remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from grounded_diffusion.bundle import TEXT_ENCODER
from grounded_diffusion.engine.pipeline.tokenizer import Tokenizer
from grounded_diffusion.engine.sampling.backend import Backend

CHUNK = 32  # texts to one call of the text encoder
REMEMBERED = 240_000_000  # bytes of contexts kept: 1,000 of them at the sizes of Stable Diffusion 1.x


class TextEncoder:
    """Runs a bundle's text encoder in bulk and keeps what it gave."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer):
        self.backend, self.tokenizer = backend, tokenizer
        self._contexts: OrderedDict[str, np.ndarray] = OrderedDict()
        self._queries: dict[str, np.ndarray] = {}

    def _encode(self, ids: list[np.ndarray]) -> np.ndarray:
        """[n,T] ids -> [n,L,D] states of the tokens, and of the text as a whole where the model wants them."""
        chunks = (np.stack(ids[i : i + CHUNK]) for i in range(0, len(ids), CHUNK))
        return np.concatenate([self.backend.run(TEXT_ENCODER, {"input_ids": chunk})["context"] for chunk in chunks])

    def contexts(self, texts: Iterable[str]) -> np.ndarray:
        """Embeddings [n,L,D] of n texts."""
        texts = list(texts)
        known = {text: self._contexts.pop(text) for text in dict.fromkeys(texts) if text in self._contexts}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            encoded = self._encode([self.tokenizer.encode(text).ids for text in missing])
            known |= {text: row.copy() for text, row in zip(missing, encoded, strict=True)}
        self._contexts |= known  # the most recent last
        most = max(1, REMEMBERED // next(iter(known.values())).nbytes)
        while len(self._contexts) > most:
            self._contexts.popitem(last=False)
        return np.stack([known[text] for text in texts])

    def queries(self, objects: list[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Object queries of a batch, padded to its largest number of objects.

        A query is the mean, over the sub-tokens of the object's name, of the encoded query template.

        Args:
            objects: names, per image; B images of up to O names.

        Returns:
            queries float32 [B,O,D], zero where padded; query_valid bool [B,O].
        """
        names = dict.fromkeys(name for image in objects for name in image)
        if missing := [name for name in names if name not in self._queries]:
            tokens, positions = zip(*map(self.tokenizer.encode_query, missing), strict=True)
            encoded = self._encode([t.ids for t in tokens])
            for name, row, place in zip(missing, encoded, positions, strict=True):
                self._queries[name] = row[list(place)].mean(0)
        width = len(next(iter(self._queries.values())))
        queries = np.zeros((len(objects), max(map(len, objects)), width), np.float32)
        valid = np.zeros(queries.shape[:2], np.bool_)
        for b, image in enumerate(objects):
            queries[b, : len(image)] = [self._queries[name] for name in image]
            valid[b, : len(image)] = True
        return queries, valid
