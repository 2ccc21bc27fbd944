"""What `srsweep train` shows while it trains, and recorders side by side."""

import sys
from collections.abc import Sequence

from db.measures import (
    SELECTION_K,
    SELECTION_METRIC,
    EvaluationRecord,
    HistogramRecord,
    Recorder,
    StepRecord,
)
from db.spec import RunSpec


class Progress:
    """Recorder that draws a bar on a terminal and a line per validation elsewhere."""

    def __init__(self, spec: RunSpec, num_users: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        total = -(-num_users // spec.batch_size) * spec.max_epochs
        self._task = self._bar.add_task("training", total=total, shown="")
        self._last_loss = float("nan")
        self._best = 0.0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def step(self, record: StepRecord) -> None:
        """Move the bar."""
        self._last_loss = record.loss
        shown = f"loss {record.loss:.4f}, best NDCG@10 {self._best:.4f}"
        self._bar.update(self._task, completed=record.step + 1, shown=shown)

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Show NDCG@10 of a validation."""
        for record in records:
            if (record.metric, record.k) != (SELECTION_METRIC, SELECTION_K):
                continue
            value = record.value or 0.0
            if record.split == "validation":
                self._best = max(self._best, value)
            if not self._console.is_terminal:
                print(
                    f"step {record.step}, epoch {record.epoch}: loss {self._last_loss:.4f}, "
                    f"{record.split} NDCG@10 {value:.4f} +- {record.standard_error or 0.0:.4f}",
                    file=sys.stderr,
                )

    def histogram(self, record: HistogramRecord) -> None:
        """Show nothing."""


class BothRecorders:
    """Passes every record on to two recorders.

    Parameters
    ----------
    first, second : Recorder
    """

    def __init__(self, first: Recorder, second: Recorder) -> None:
        self._recorders = (first, second)

    def step(self, record: StepRecord) -> None:
        """Pass a step row on."""
        for recorder in self._recorders:
            recorder.step(record)

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Pass evaluation rows on."""
        for recorder in self._recorders:
            recorder.evaluation(records)

    def histogram(self, record: HistogramRecord) -> None:
        """Pass a histogram on."""
        for recorder in self._recorders:
            recorder.histogram(record)
