"""Argument checks shared by the wrappers: the C++ side trusts what passed here."""

from __future__ import annotations

import numpy as np


def check_array(value: object, name: str, dtypes: tuple[type, ...], shape: tuple[int | None, ...]) -> np.ndarray:
    """`value` itself, if it is a C-contiguous array of one of `dtypes` with `shape` (None: any length).

    Raises:
        TypeError: not an array, or another dtype.
        ValueError: another shape, or not contiguous.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array, not {type(value).__name__}")
    if value.dtype.type not in dtypes:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        raise TypeError(f"{name} must be {wanted}, not {value.dtype.name}")
    fits = value.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, value.shape, strict=True))
    if not fits:
        wanted = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(value.shape)}")
    if not value.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; pass numpy.ascontiguousarray({name})")
    return value


def check_output(value: object, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An output to write: a fresh one for None, else `value` once it is checked and found writable."""
    if value is None:
        return np.empty(shape, dtype)
    out = check_array(value, name, (dtype,), shape)
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only; pass a writable array")
    return out


def check_apart(written: dict[str, np.ndarray], read: dict[str, np.ndarray]) -> None:
    """Raise ValueError where a written array overlaps another one without being exactly the same memory.

    The loops are element by element: the very same memory is safe (in place), a shifted view is not.
    """
    for name, out in written.items():
        for other, array in (written | read).items():
            if other == name or not np.may_share_memory(out, array):
                continue
            if other in written or out.ctypes.data != array.ctypes.data or out.nbytes != array.nbytes:
                raise ValueError(f"{name} overlaps {other} in memory; pass separate arrays, or the very same one")
