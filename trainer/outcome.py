"""What a run leaves behind: counters and timings while it trains, its result at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from db.measures import (
    SELECTION_K,
    SELECTION_METRIC,
    EvaluationRecord,
    MemorySource,
    RunResult,
    metric_column,
)
from db.spec import RunStatus

WARM_UP_STEPS = 3
"""First steps allocate, load code and choose kernels; their times say nothing about training."""


@dataclass
class Progress:
    """How far a run has come and what was measured; part of every checkpoint.

    Attributes
    ----------
    step, epoch, batch : int
        Optimizer steps done, epoch under way, batches of it done.
    best_step : int, optional
        Step of the best validation.
    best : float
        Its NDCG@10.
    best_records : list of EvaluationRecord
        All its metrics.
    validations_since_best : int
    last_validation : int
        Step of the last validation.
    epoch_losses : list of float
        Losses of the epoch under way.
    final_loss : float, optional
        Mean loss of the last whole epoch.
    step_seconds, evaluation_seconds, epoch_seconds : list of float
    tokens : list of int
        Per step.
    peak_train_bytes, peak_eval_bytes : int
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_step: int | None = None
    best: float = float("-inf")
    best_records: list[EvaluationRecord] = field(default_factory=list)
    validations_since_best: int = 0
    last_validation: int = -1
    epoch_losses: list[float] = field(default_factory=list)
    final_loss: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_train_bytes: int = 0
    peak_eval_bytes: int = 0

    def end_epoch(self) -> None:
        """Close the books of an epoch and begin the next."""
        count = len(self.epoch_losses)
        self.epoch_seconds.append(sum(self.step_seconds[-count:]))
        self.final_loss = fmean(self.epoch_losses)
        self.epoch_losses = []
        self.epoch += 1
        self.batch = 0

    def take_validation(self, records: Sequence[EvaluationRecord]) -> bool:
        """Note a validation; whether it is strictly better than all before."""
        value = selection_value(records)
        self.last_validation = self.step
        if value is not None and value > self.best:
            self.best, self.best_step = value, self.step
            self.best_records = list(records)
            self.validations_since_best = 0
            return True
        self.validations_since_best += 1
        return False

    def result(
        self,
        status: RunStatus,
        *,
        num_parameters: int,
        memory_source: MemorySource,
        stop_reason: str,
        test: Sequence[EvaluationRecord] = (),
        **more: Any,
    ) -> RunResult:
        """Result of the run from what was noted."""
        timed = self.step_seconds[WARM_UP_STEPS:] or self.step_seconds
        tokens = self.tokens[WARM_UP_STEPS:] or self.tokens
        begun = bool(self.epoch_losses)
        final_loss = fmean(self.epoch_losses) if begun else self.final_loss
        return RunResult(
            status=status,
            num_steps=self.step,
            num_epochs=self.epoch + int(begun),
            best_step=self.best_step,
            num_parameters=num_parameters,
            test=metric_values(test),
            validation=metric_values(self.best_records),
            final_loss=final_loss,
            peak_train_memory_bytes=self.peak_train_bytes or None,
            peak_eval_memory_bytes=self.peak_eval_bytes or None,
            memory_source=memory_source,
            time_source="training_only",
            epoch_seconds=median(self.epoch_seconds) if self.epoch_seconds else None,
            evaluation_seconds=median(self.evaluation_seconds) if self.evaluation_seconds else None,
            step_seconds=median(timed) if timed else None,
            train_seconds=sum(self.step_seconds) if self.step_seconds else None,
            tokens_per_second=sum(tokens) / sum(timed) if timed else None,
            stop_reason=stop_reason,
            **more,
        )


def selection_value(records: Sequence[EvaluationRecord]) -> float | None:
    """The validation metric that early stopping and the best weights go by."""
    for record in records:
        if record.metric == SELECTION_METRIC and record.k == SELECTION_K:
            return record.value
    return None


def metric_values(records: Sequence[EvaluationRecord]) -> dict[str, float | None]:
    """Values and standard errors of an evaluation by column name."""
    values: dict[str, float | None] = {}
    for record in records:
        column = metric_column(record.metric, record.k)
        values[column] = record.value
        values[f"{column}_se"] = record.standard_error
    return values
