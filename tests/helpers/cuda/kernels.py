"""The launchers of `CudaKernels` on a library of kernels for the CPU."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import numpy as np

from grounded_diffusion.kernels.cuda.launch import CudaKernels


class CpuCudaKernels(CudaKernels):
    """Everything of CudaKernels but the last call: a launch runs on fibers, at once, whatever the stream.

    Args:
        library: one that `compile.build` made.
        reversed_: blocks run from the last to the first, as on a GPU they may.
    """

    def __init__(self, library: Path, reversed_: bool = False) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.device_allocate.restype = ctypes.c_void_p
        self.library.launch.restype = ctypes.c_char_p
        self.library.run_blocks_reversed(reversed_)

    def _launch(self, stream, name, grid, block, *args):
        kinds = [np.ctypeslib.as_ctypes_type(np.uint64 if isinstance(a, int) else a.dtype) for a in args]
        values = [kind(a if isinstance(a, int) else a.item()) for kind, a in zip(kinds, args, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        error = self.library.launch(name.encode(), dim(grid), dim(block), pointers)
        assert error is None, f"{name}: {error.decode()}"

    def put(self, array: np.ndarray) -> CpuArray:
        """See CpuArray."""
        return CpuArray(array, self.library)


class CpuArray:
    """`DeviceArray` in memory that ends exactly where the array ends, so that a sanitizer sees every access beyond."""

    def __init__(self, array: np.ndarray, library: ctypes.CDLL) -> None:
        self._like = np.ascontiguousarray(array)
        self.pointer = library.device_allocate(max(1, array.nbytes))
        weakref.finalize(self, library.device_free, ctypes.c_void_p(self.pointer))
        ctypes.memmove(self.pointer, self._like.ctypes.data, array.nbytes)

    def numpy(self) -> np.ndarray:
        """The contents now."""
        out = np.empty_like(self._like)
        ctypes.memmove(out.ctypes.data, self.pointer, out.nbytes)
        return out


def dim(value: int | tuple[int, ...]) -> ctypes.Array:
    """A grid or block of three numbers."""
    sides = (value,) if isinstance(value, int) else value
    return (ctypes.c_uint * 3)(*map(int, sides), *[1] * (3 - len(sides)))
