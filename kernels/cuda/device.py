"""Device memory for benches and GPU tests: an array that lives on the GPU and comes back as NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from grounded_diffusion.errors import BackendError


def gpu_name() -> str | None:
    """Name of the first NVIDIA GPU, or None where there is no GPU, driver or cuda-core."""
    try:
        from cuda.core import Device

        return Device(0).name
    except Exception:  # ImportError, or cuda-core's own class for a missing driver or device
        return None


class DeviceArray:
    """A copy of a NumPy array in device memory; `pointer` is its address."""

    def __init__(self, array: np.ndarray, device: Any, stream: Any) -> None:
        self._like = np.ascontiguousarray(array)
        self._stream = stream
        self._buffer = device.allocate(max(1, self._like.nbytes), stream=stream)
        self.pointer = int(self._buffer.handle)
        from cuda.bindings import driver

        _check(driver.cuMemcpyHtoD(self.pointer, self._like.ctypes.data, self._like.nbytes))

    def numpy(self) -> np.ndarray:
        """The contents now, once the stream has done its work."""
        from cuda.bindings import driver

        self._stream.sync()
        out = np.empty_like(self._like)
        _check(driver.cuMemcpyDtoH(out.ctypes.data, self.pointer, out.nbytes))
        return out


def _check(answer: tuple) -> None:
    if int(answer[0]) != 0:
        raise BackendError(f"a copy between host and GPU failed: {answer[0].name}; check nvidia-smi")
