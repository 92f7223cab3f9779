"""Weights of all graphs of a bundle, stored once.

Tensors go to `weights.0.bin`, `weights.1.bin`, ... as they come, one after the other; equal tensors of one type share
their place, whichever graph they belong to. The graphs refer to them as ONNX external data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir

FILE_LIMIT = 2_000_000_000  # bytes a file: below the 2 GiB that some tools and file systems stop at
ALIGNMENT = 4096  # bytes; a page, so that tensors can be mapped from the file
INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference can see them


class WeightStore:
    """Appends tensors to the weight files of a directory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[str] = []
        self._size = FILE_LIMIT  # of the current file; full, so that the first tensor opens one
        self._places: dict[bytes, tuple[str, int, int]] = {}

    def place(self, data: bytes | memoryview, kind: str = "") -> tuple[str, int, int]:
        """File, offset and length in bytes of a tensor's data, written unless it is there already.

        Tensors of another `kind` (type) never share a place: TensorRT refuses one address with two lengths, and the
        zeros of a type have the bytes of the zeros of any other.
        """
        hasher = hashlib.sha256(kind.encode() + b"\0")
        hasher.update(data)
        digest = hasher.digest()
        if digest not in self._places:
            start = -(-self._size // ALIGNMENT) * ALIGNMENT
            if start + len(data) > FILE_LIMIT:  # a tensor above the limit has a file for itself
                self.files.append(f"weights.{len(self.files)}.bin")
                start = 0
            with (self.folder / self.files[-1]).open("ab") as stream:
                stream.truncate(start)
                stream.seek(start)
                stream.write(data)
            self._size = start + len(data)
            self._places[digest] = (self.files[-1], start, len(data))
        return self._places[digest]

    def move(self, model: onnx_ir.Model) -> None:
        """Move the model's initialisers here; `model` refers to them afterwards."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE or getattr(tensor, "base_dir", None) == self.folder:
                continue
            file, offset, length = self.place(tensor.tobytes(), tensor.dtype.name)
            value.const_value = onnx_ir.ExternalTensor(
                file, offset, length, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=self.folder
            )


def parameter_bytes(model: onnx_ir.Model) -> int:
    """Bytes of all initialisers of a model."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
