"""What is measured: names, units, directions, and the records that carry them.

Standard library only. SI units, with the unit in the name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from db.spec import RunStatus

METRICS: tuple[str, ...] = (
    "ndcg",
    "hit_rate",
    "recall",
    "precision",
    "mrr",
    "map",
    "coverage",
    "surprisal",
)
"""Ranking metrics in the order they are shown."""
KS: tuple[int, ...] = (1, 5, 10, 20, 100)
"""Cut-offs of every metric."""
SELECTION_METRIC, SELECTION_K = "ndcg", 10
"""Early stopping and the best checkpoint go by validation NDCG@10."""

Split = Literal["validation", "test"]
MemorySource = Literal["cuda_allocated", "resident", "published_mixed"]
TimeSource = Literal["training_only", "published_mixed"]


def metric_column(metric: str, k: int) -> str:
    """Column name of a metric at a cut-off: `ndcg_at_10`."""
    return f"{metric}_at_{k}"


METRIC_COLUMNS: tuple[str, ...] = tuple(metric_column(m, k) for m in METRICS for k in KS)
"""Column names of all metrics at all cut-offs, in frames and CSV files."""


@dataclass(frozen=True)
class Measure:
    """How a measured quantity is named, shown and compared.

    Attributes
    ----------
    name : str
        Column name in frames, SQL and CSV files.
    label : str
        Text for axes and table heads, with the display unit.
    unit : str
        SI unit of the stored value; empty for a ratio.
    maximise : bool
        Whether more is better.
    display_scale : float
        What the stored value is divided by for display (2**30 for GiB).
    definition : str
        One sentence for a reader who has never met it.
    """

    name: str
    label: str
    unit: str
    maximise: bool
    display_scale: float
    definition: str


_METRIC_TEXTS = {
    "ndcg": ("NDCG", "discounted gain of the target's rank over the ideal one, mean over users"),
    "hit_rate": ("HitRate", "share of users whose target is among the first k"),
    "recall": ("Recall", "share of the targets among the first k; HitRate for one target"),
    "precision": ("Precision", "hits among the first k over k"),
    "mrr": ("MRR", "reciprocal rank of the first hit within k, mean over users"),
    "map": ("MAP", "mean average precision within k; MRR for one target"),
    "coverage": ("Coverage", "share of the catalog recommended to at least one user within k"),
    "surprisal": (
        "Surprisal",
        "mean over the list of log2(N/u)/log2(N) with N training users and u users of the item: "
        "1 for items nobody knows, 0 for items everybody has",
    ),
}


def _measures() -> dict[str, Measure]:
    found = [
        Measure(metric_column(name, k), f"{label}@{k}", "", True, 1.0, text)
        for name, (label, text) in _METRIC_TEXTS.items()
        for k in KS
    ]
    gib, note = float(2**30), "highest number of bytes in use"
    found += [
        Measure("peak_train_memory_bytes", "Peak training memory, GiB", "byte", False, gib,
                f"{note} over training steps, evaluation apart"),
        Measure("peak_eval_memory_bytes", "Peak evaluation memory, GiB", "byte", False, gib,
                f"{note} over evaluations, training apart"),
        Measure("epoch_seconds", "Time per epoch, s", "second", False, 1.0,
                "median time of the optimizer steps of one epoch, without evaluation"),
        Measure("evaluation_seconds", "Time per evaluation, s", "second", False, 1.0,
                "median time of one evaluation"),
        Measure("step_seconds", "Time per step, ms", "second", False, 1e-3,
                "median time of one synchronised optimizer step, warm-up excluded"),
        Measure("train_seconds", "Training time, s", "second", False, 1.0,
                "sum of the optimizer steps of the run, without evaluation"),
        Measure("tokens_per_second", "Valid tokens per second", "1/second", True, 1.0,
                "unpadded tokens per second of optimizer step"),
    ]  # fmt: skip
    return {measure.name: measure for measure in found}


MEASURES: dict[str, Measure] = _measures()
"""Every measure by column name."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step as it was measured."""

    step: int
    """Number of the optimizer step in the run, from 0."""
    epoch: int
    """Number of the pass over the data, from 0."""
    loss: float
    """Training loss of the step; NaN and inf are stored as null."""
    gradient_norm: float | None
    """Euclidean norm of all gradients, before any scaling of the optimizer."""
    learning_rate: float
    step_seconds: float
    """Synchronised time from the batch at hand to the updated weights."""
    tokens: int
    """Valid (unpadded) input tokens of the batch."""
    allocated_bytes: int | None
    """Bytes in use after the step: allocated by torch on CUDA, resident on a CPU."""
    reserved_bytes: int | None
    """Bytes held by the allocator; null on a CPU."""
    peak_bytes: int | None
    """Highest bytes in use during the step."""


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One metric at one cut-off in one evaluation."""

    step: int
    """Optimizer steps done when the evaluation ran."""
    epoch: int
    split: Split
    metric: str
    k: int
    value: float | None
    """Null where the metric is not defined."""
    standard_error: float | None
    """Over users; by bootstrap over users for Coverage."""
    num_users: int


@dataclass(frozen=True, slots=True)
class HistogramRecord:
    """Counts of values between bin edges; bins count as [edge, next edge)."""

    step: int
    name: str
    edges: tuple[float, ...]
    """Shape (B + 1,)."""
    counts: tuple[int, ...]
    """Shape (B,)."""


class Recorder(Protocol):
    """What training reports to; the store's writer and a list in memory both are one."""

    def step(self, record: StepRecord) -> None:
        """Take one step row; must not block training."""

    def evaluation(self, records: Sequence[EvaluationRecord]) -> None:
        """Take all rows of one evaluation."""

    def histogram(self, record: HistogramRecord) -> None:
        """Take one histogram."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run amounts to; becomes the run's row of `run_summary`."""

    status: RunStatus
    """done, diverged or out_of_memory; anything else is raised."""
    num_steps: int
    """Optimizer steps taken, the diverging one not counted."""
    num_epochs: int
    """Passes over the data begun."""
    best_step: int | None
    """Step of the best validation, whose weights the test used."""
    num_parameters: int
    test: Mapping[str, float | None] = field(default_factory=dict)
    """Test metrics by column name (`ndcg_at_10`), and `<name>_se` for their standard errors."""
    validation: Mapping[str, float | None] = field(default_factory=dict)
    """Best validation metrics, named alike."""
    final_loss: float | None = None
    """Mean training loss of the last epoch."""
    peak_train_memory_bytes: int | None = None
    peak_eval_memory_bytes: int | None = None
    memory_source: MemorySource = "resident"
    time_source: TimeSource = "training_only"
    epoch_seconds: float | None = None
    evaluation_seconds: float | None = None
    step_seconds: float | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    stop_reason: str = ""
    """Why training ended: max_epochs, patience, diverged, out_of_memory."""
    error: str | None = None
    """One line for a run that did not end well."""
    requested_bytes: int | None = None
    """Bytes asked for when memory ran out."""
    allocated_bytes: int | None = None
    """Bytes in use when memory ran out."""
    total_bytes: int | None = None
    """Bytes of the device when memory ran out."""
