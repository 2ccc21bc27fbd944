"""A thread that ends an attempt whose training hangs: no step, no evaluation, no end."""

import contextlib
import os
import threading
import time
from collections.abc import Callable

from sweeper.plan import STALLED, TIME_LIMIT

EXIT_CODE = 75
"""Of a worker process that its watchdog ended (EX_TEMPFAIL)."""
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0
"""After the time limit, for a long step or evaluation to end by itself."""


class Watchdog:
    """Watches one attempt; a context manager.

    The heartbeat of an attempt comes from the writer's thread and goes on while training hangs in
    a kernel, a collective or a lock, where no exception can reach it. So the watchdog writes down
    how the attempt ended and leaves the process, which frees its device.

    Parameters
    ----------
    fail : callable
        Ends the attempt; takes an error class and a message.
    stall_seconds : float, optional
        Longest time between two signs of progress.
    limit_seconds : float, optional
        Longest time of the run.
    leave : callable
        Ends this process.
    """

    def __init__(
        self,
        fail: Callable[[str, str], object],
        *,
        stall_seconds: float | None,
        limit_seconds: float | None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._fail = fail
        self._stall = stall_seconds
        self._limit = limit_seconds
        self._leave = leave
        self._began = self._seen = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="srsweep-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def progress(self) -> None:
        """Note a sign of progress."""
        self._seen = time.monotonic()

    def _run(self) -> None:
        pause = min(_LOOK_SECONDS, (self._stall or _LOOK_SECONDS) / 4)
        while not self._done.wait(pause):
            trouble = self._trouble()
            if trouble is not None:
                # what cannot be written down is found out by the lease
                with contextlib.suppress(Exception):
                    self._fail(*trouble)
                self._leave(EXIT_CODE)
                return

    def _trouble(self) -> tuple[str, str] | None:
        now = time.monotonic()
        if self._stall is not None and now - self._seen > self._stall:
            return STALLED, f"training reported nothing for stall_seconds={self._stall:g}"
        if self._limit is not None and now - self._began > self._limit + _GRACE_SECONDS:
            return TIME_LIMIT, (
                f"the run took longer than time_limit_seconds={self._limit:g}, and its last step "
                f"or evaluation did not end within {_GRACE_SECONDS:g} s"
            )
        return None
