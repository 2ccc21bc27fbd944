"""What a user sees while a sweep runs: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from db.spec import RunSpec, RunStatus

_SHOWN = (
    RunStatus.DONE,
    RunStatus.RUNNING,
    RunStatus.FAILED,
    RunStatus.OUT_OF_MEMORY,
    RunStatus.DIVERGED,
    RunStatus.SKIPPED,
)


@dataclass(frozen=True)
class Snapshot:
    """State of a sweep at one moment, over all its drivers."""

    counts: Mapping[str, int]
    """Runs by status."""
    best: float | None = None
    """Highest test NDCG@10 so far."""
    remaining_seconds: float | None = None
    num_cut: int = 0
    """Pending runs that were cut short and are not tried again by this launch."""

    @property
    def total(self) -> int:
        """Runs of the sweep."""
        return sum(self.counts.values())

    @property
    def final(self) -> int:
        """Runs that nothing more will be tried for."""
        ended = sum(n for status, n in self.counts.items() if RunStatus(status).is_final)
        return ended + self.num_cut

    def text(self) -> str:
        """Counts that matter, the best NDCG and the remaining time on one line."""
        parts = [
            f"{self.counts.get(status, 0)} {status.value.replace('_', ' ')}"
            for status in _SHOWN
            if self.counts.get(status, 0) or status in (RunStatus.DONE, RunStatus.RUNNING)
        ]
        if self.num_cut:
            parts.append(f"{self.num_cut} cut short")
        if self.best is not None:
            parts.append(f"best NDCG@10 {self.best:.4f}")
        if self.remaining_seconds is not None and self.final < self.total:
            parts.append(f"about {duration(self.remaining_seconds)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def describe(spec: RunSpec, varying: tuple[str, ...]) -> str:
    """Short name of a run: the fields that vary in its sweep."""
    short = {"batch_size": "bs", "max_seq_len": "sl", "num_negatives": "ns"}
    words = []
    for name in varying:
        value = getattr(spec, name)
        if name == "loss":
            words.append(str(value))
        elif value is not None:
            words.append(f"{short.get(name, name)}={value}")
    return " ".join(words) or spec.loss


@dataclass
class RateClock:
    """Estimates the remaining time from the runs that this launch has finished.

    Runs are weighted by their predicted cost, so that long runs at the start do not mislead.
    """

    costs: Mapping[str, float]
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0

    def finished(self, key: str) -> None:
        """Take note of a finished run."""
        self.spent += self.costs.get(key, 0.0)

    def remaining_seconds(self, keys: Iterable[str]) -> float | None:
        """Seconds for the given unfinished runs at the rate so far; None before the first."""
        if not self.spent:
            return None
        left = sum(self.costs.get(key, 0.0) for key in keys)
        return (time.monotonic() - self.began) * left / self.spent


class Display(Protocol):
    """Where a launch reports to."""

    def note(self, text: str) -> None:
        """Say something that a user should know."""

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """Report how a run ended."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the state of the sweep."""


class PlainDisplay:
    """One line per finished run; for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._snapshot = Snapshot({})

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """Print the run with how far the sweep is."""
        self.note(result_line(name, result))

    def update(self, snapshot: Snapshot) -> None:
        """Print the state whenever another run became final."""
        if snapshot.final != self._snapshot.final:
            self.note(f"[{snapshot.final}/{snapshot.total}] {snapshot.text()}")
        self._snapshot = snapshot


class RichDisplay:
    """A progress bar that stays at the bottom, finished runs scrolling above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._task = self._progress.add_task("runs", total=None, state="")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)

    def finished(self, name: str, result: Mapping[str, Any]) -> None:
        """Print the run above the bar."""
        self.note(result_line(name, result))

    def update(self, snapshot: Snapshot) -> None:
        """Move the bar."""
        self._progress.update(
            self._task, completed=snapshot.final, total=snapshot.total, state=snapshot.text()
        )

    def start(self) -> None:
        """Show the bar."""
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


def result_line(name: str, result: Mapping[str, Any]) -> str:
    """One line for a run that ended."""
    outcome = str(result.get("outcome", "?")).replace("_", " ")
    parts = [f"{outcome:<13}", f"{name:<32}"]
    if result.get("ndcg_at_10") is not None:
        parts.append(f"NDCG@10 {result['ndcg_at_10']:.4f}")
    if result.get("seconds") is not None:
        parts.append(duration(result["seconds"]))
    if result.get("error"):
        parts.append(str(result["error"])[:200])
    return "  ".join(parts).rstrip()


@contextlib.contextmanager
def open_display() -> Iterator[Display]:
    """Rich display on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield PlainDisplay()
        return
    display = RichDisplay()
    display.start()
    try:
        yield display
    finally:
        display.stop()
