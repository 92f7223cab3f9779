"""Stopping when asked to: SIGTERM, SIGINT and SIGHUP end a command within seconds, whatever it is doing."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable

from grounded_diffusion.errors import Interrupted

GRACE = 6.0  # seconds to end by itself; Kubernetes, Slurm and we promise more
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop:
    """A request to stop, which a program checks wherever it can.

    As a context manager it is set by SIGTERM, SIGINT and SIGHUP, the last unless it is ignored, as under nohup. A
    program that has not ended GRACE seconds after the first signal, or at the second one, is ended on the spot: nothing
    that matters is ever written in part. A thread reads the signals, as Python's own handlers wait for a long call of a
    library to return.

    Args:
        last: called before the program is ended on the spot, with the name of the signal; has a second.
    """

    def __init__(self, last: Callable[[str], None] = lambda name: None):
        self.last, self.name = last, ""
        self._asked = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    def ask(self, name: str) -> None:
        """Request a stop; `name` says who does."""
        self.name = name
        self._asked.set()
        for listener in self._listeners.copy():
            listener()

    def tell(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have a function called, in another thread, as soon as a stop is requested; what is returned ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        """Raise Interrupted once a stop is requested."""
        if self:
            raise Interrupted(f"interrupted by {self.name}; the same command goes on")

    def wait(self, seconds: float) -> None:
        """Sleep. Raises Interrupted as soon as a stop is requested."""
        self._asked.wait(seconds)
        self.check()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._before = {
                number: signal.signal(number, lambda *_: None)
                for number in SIGNALS
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
            }
            self._watcher = threading.Thread(target=self._watch, name="stop", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._writer.send(b"\0")
            self._watcher.join()
            self._reader.close()
            self._writer.close()

    def _watch(self) -> None:
        if number := self._signal(None):
            name = signal.Signals(number).name
            self.ask(name)
            if self._signal(GRACE) != 0:
                ending = threading.Thread(target=self.last, args=(name,), daemon=True)
                ending.start()
                ending.join(1)
                os._exit(Interrupted.exit_code)

    def _signal(self, seconds: float | None) -> int | None:
        """The next signal that asks to stop; 0 once it is over, None when the time is up."""
        self._reader.settimeout(seconds)
        try:
            while (number := self._reader.recv(1)[0]) not in (0, *SIGNALS):
                pass
            return number
        except TimeoutError:
            return None
