"""Ctrl-C and SIGTERM as one exception in the main thread, with the exit code a shell expects."""

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


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interruption` on the first SIGINT or SIGTERM.

    A repeat within two seconds is taken for the same wish (a terminal and `make` both send one);
    a later one ends the process at once. Outside the main thread, where Python delivers no
    signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def stop(number: int, frame: types.FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise Interruption(number)
        if time.monotonic() - first[0] > _PATIENCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
