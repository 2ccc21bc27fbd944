"""SIGKILL of a worker at a named point of its attempt, once for each run.

The points lie inside the store, so they are set from outside, in the worker's own process: what
ships knows nothing of them.
"""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from db import leases, writer

POINTS = (
    "after claim", "mid buffer", "before commit", "after commit", "before finish", "after finish",
)  # fmt: skip
"""In the order in which an attempt passes them."""

_armed: dict[str, Path] = {}
"""Point of the attempt under way -> its marker."""


def arm(point: str | None, folder: Path) -> None:
    """Have this process killed when its attempt passes a point, unless one was killed there.

    Parameters
    ----------
    point : str, optional
        One of `POINTS`; None disarms, for the next attempt in a reused process.
    folder : Path
        The run's own, where a marker named after the point tells that a process died there.
    """
    _armed.clear()
    if point is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / point.replace(" ", "-")
    if not marker.exists():
        _armed[point] = marker
        _set_points()
        _pass("after claim")


def _pass(point: str) -> None:
    """Die here if this is the point."""
    marker = _armed.get(point)
    if marker is not None:
        handle = os.open(marker, os.O_CREAT | os.O_WRONLY)
        os.fsync(handle)
        os.kill(os.getpid(), signal.SIGKILL)


def _after(function: Callable[..., Any], point: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def passing(*words: Any, **options: Any) -> Any:
        result = function(*words, **options)
        _pass(point)
        return result

    return passing


@functools.cache
def _set_points() -> None:
    # rows are taken but not flushed; inserted but not committed; and so on
    for owner, name, point in (
        (writer.RunWriter, "step", "mid buffer"),
        (writer, "insert_batch", "before commit"),
        (writer.RunWriter, "_transact", "after commit"),
        (leases, "finish", "before finish"),
        (writer.RunWriter, "finish", "after finish"),
    ):
        setattr(owner, name, _after(getattr(owner, name), point))
