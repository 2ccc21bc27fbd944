"""A thread that looks after a sweep while Ray Tune holds the main one: leases, pruning, display."""

import threading
from collections.abc import Callable

from db.errors import StoreError


class Monitor:
    """Calls a function every few seconds until it is left; a context manager.

    Parameters
    ----------
    look : callable
        What to do each time. A StoreError is reported once and tried again: the database may be
        away for a while, and the workers do not need the planner meanwhile.
    every_seconds : float
        Pause between two calls.
    note : callable
        Takes one line for the user.
    """

    def __init__(
        self, look: Callable[[], None], every_seconds: float, note: Callable[[str], None]
    ) -> None:
        self._look = look
        self._every = every_seconds
        self._note = note
        self._stop = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="srsweep-monitor", daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._look()
            except StoreError as error:
                if not self._away:
                    self._note(f"the run database is away, training goes on: {error}")
                self._away = True
            else:
                if self._away:
                    self._note("the run database is back")
                self._away = False
