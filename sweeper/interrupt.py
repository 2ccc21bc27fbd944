"""Ctrl-C and SIGTERM: noticed at once, acted upon where nothing is left half done."""

import contextlib
import os
import signal
import threading
import time
import types
from collections.abc import Iterator

_PATIENCE_SECONDS = 2.0


class Interruption(BaseException):
    """The user or the system asked the process to stop.

    Parameters
    ----------
    number : int
        Signal that did.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Whether a signal to stop has come.

    Nothing is raised from the handler itself: Ray turns an exception that a handler raises inside
    its C++ code into a SystemError and goes on.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._came = threading.Event()

    def check(self) -> None:
        """Return unless a signal has come.

        Raises
        ------
        Interruption
            One has.
        """
        if self._number is not None:
            raise Interruption(self._number)

    def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until a signal comes.

        Raises
        ------
        Interruption
            One has come.
        """
        self._came.wait(seconds)
        self.check()

    def take(self, number: int) -> None:
        """Note a signal."""
        self._number = number
        self._came.set()


@contextlib.contextmanager
def interruptible() -> Iterator[Signals]:
    """Take SIGINT and SIGTERM as wishes to stop.

    A repeat within two seconds is taken for the same wish (a terminal and `make` both send one);
    a later one ends the process at once. Outside the main thread, where Python delivers no
    signals, nothing is changed.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    first: list[float] = []

    def stop(number: int, frame: types.FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            signals.take(number)
        elif time.monotonic() - first[0] > _PATIENCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
