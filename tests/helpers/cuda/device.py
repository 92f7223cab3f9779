"""The real `CudaDevice` over the driver of `driver.cpp`, with the counters that the tests of the device loop read.

The process must have been started with LD_LIBRARY_PATH naming a folder where that driver is libcuda.so.1.
"""

from __future__ import annotations

import ctypes

from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice

WORK = ctypes.CFUNCTYPE(None, ctypes.c_long)


class FakeDriverDevice(CudaDevice):
    """One GPU of host memory, behind cuda-core.

    Args:
        memory: bytes that it has.
        eager: which of its streams, by their number, run everything at once.
    """

    def __init__(self, memory: int, eager: tuple[int, ...]) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.driver.fake_used.restype = ctypes.c_size_t
        self.driver.fake_complaints.restype = ctypes.c_char_p
        self.driver.fake_open(ctypes.c_size_t(memory), sum(1 << number for number in eager))
        super().__init__()
        self.captures = self.replays = 0
        self._functions: list = []  # kept as long as they may be called

    @property
    def used(self) -> int:
        """Bytes that are allocated."""
        return self.driver.fake_used()

    @property
    def complaints(self) -> list[str]:
        """What was done since it was opened that a GPU would punish."""
        return self.driver.fake_complaints().decode().splitlines()

    def put(self, stream, work) -> None:
        """Python's work on a stream, as a library's kernels would be."""
        self._functions.append(WORK(lambda tag: work()))
        self.driver.fake_put(ctypes.c_void_p(int(stream.handle)), self._functions[-1], 0)

    def capture(self, stream, work):
        self.captures += 1
        replay = super().capture(stream, work)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted
