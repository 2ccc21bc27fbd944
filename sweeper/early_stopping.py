"""Runs that one of Ray Tune's schedulers may cut short, and how training hears of it.

Off unless the grid file asks for it. A run that was cut is no result: its attempt ends as
`cancelled` with error class `CutShort`, the run stays `pending` with the reason, and a launch
without a scheduler carries it out. Knows no Ray: the scheduler itself is made in `tuning`.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from db.measures import EvaluationRecord
from db.spec import RunSpec, suggestion
from sweeper.located import Located

METRIC = "validation_ndcg_at_10"
"""What runs are compared by."""
TIME = "epochs"
"""After how many epochs."""
ANSWER_SECONDS = 10.0
"""How long training waits for the scheduler; a driver whose database is away answers late."""
_STOP_SECONDS = 60.0
_SCHEDULERS = ("asha", "median")
_KEYS = ("scheduler", "grace_epochs", "reduction_factor", "min_runs")


@dataclass(frozen=True)
class EarlyStopping:
    """Which scheduler may cut runs short."""

    scheduler: Literal["asha", "median"]
    grace_epochs: int = 1
    """No run is cut before so many epochs."""
    reduction_factor: float = 4.0
    """asha: one in so many runs goes on from each rung; rungs are this factor apart."""
    min_runs: int = 3
    """median: runs to compare with before any is cut."""


class CutShort(Exception):
    """The scheduler ended a run whose validation metric is behind the others'."""


Report = Callable[[Sequence[EvaluationRecord]], None]
"""Called with each evaluation, and with none after each step; what it raises ends the run."""


def read_early_stopping(where: Located) -> EarlyStopping:
    """Read `early_stopping: asha`, or the mapping with a scheduler and its settings.

    Raises
    ------
    GridError
        An unknown scheduler, key or value; the text begins with file and line.
    """
    found = where.value if isinstance(where.value, dict) else {"scheduler": where}
    for name, value in found.items():
        if name not in _KEYS:
            raise value.error(f"unknown key {name!r}{suggestion(name, _KEYS)}")
    if "scheduler" not in found:
        raise where.error(f"early_stopping needs 'scheduler', one of {', '.join(_SCHEDULERS)}")
    scheduler = found["scheduler"].scalar("scheduler")
    if scheduler not in _SCHEDULERS:
        raise found["scheduler"].error(
            f"scheduler {scheduler!r} is unknown{suggestion(str(scheduler), _SCHEDULERS)}; "
            f"there are {', '.join(_SCHEDULERS)}"
        )
    for name, only in (("reduction_factor", "asha"), ("min_runs", "median")):
        if name in found and scheduler != only:
            raise found[name].error(f"{name} is a setting of {only}, not of {scheduler}")
    values: dict[str, Any] = {}
    for name in ("grace_epochs", "min_runs"):
        if name in found:
            value = found[name].scalar(name)
            if type(value) is not int or value < 1:
                raise found[name].error(f"{name}={value!r} must be a whole number, 1 or more")
            values[name] = value
    if "reduction_factor" in found:
        value = found["reduction_factor"].scalar("reduction_factor")
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 1:
            raise found["reduction_factor"].error(f"reduction_factor={value!r} must be above 1")
        values["reduction_factor"] = float(value)
    return EarlyStopping(scheduler, **values)


def check_early_stopping(
    where: Located, settings: EarlyStopping, points: Sequence[RunSpec], *, search: bool
) -> None:
    """Refuse a grid whose runs a scheduler cannot compare.

    Raises
    ------
    GridError
        Several datasets, a search, or a grace period that spares every run.
    """
    names = sorted({spec.dataset for spec in points})
    if len(names) > 1:
        raise where.error(
            f"early_stopping compares the validation NDCG@10 of runs, and the grid has {len(names)}"
            f" datasets ({', '.join(names)}); make a grid of each"
        )
    if search:
        raise where.error("early_stopping and search exclude each other: a search asks for whole "
                          "runs; leave one out")  # fmt: skip
    longest = max(spec.max_epochs for spec in points)
    if settings.grace_epochs >= longest:
        raise where.error(
            f"grace_epochs={settings.grace_epochs} spares every run: the longest has "
            f"max_epochs={longest}; lower it or leave early_stopping out"
        )


class Conversation:
    """Between a run's training in a thread of its own and a scheduler that is asked elsewhere.

    Parameters
    ----------
    carry_out : callable
        Carries out the run and tells the given function of every evaluation.
    scheduler : str
        Name for the reason.
    """

    def __init__(self, carry_out: Callable[[Report], dict[str, Any]], scheduler: str) -> None:
        self._carry_out = carry_out
        self._scheduler = scheduler
        self._changed = threading.Condition()
        self._news: dict[str, Any] | None = None
        self._seen: dict[str, Any] = {METRIC: math.nan, TIME: 0}
        self._judged = ""
        self._may_go_on = True
        self._verdict: BaseException | None = None
        self._end: dict[str, Any] | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="srsweep-training", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """Let training go on, and wait for its next evaluation or its end.

        Returns
        -------
        dict
            Metric and epochs of an evaluation with `done` false, or the result with `done` true.

        Raises
        ------
        BaseException
            What the run raised.
        """
        with self._changed:
            self._may_go_on = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._news is not None or self._end is not None)
            if self._news is not None:
                news, self._news = self._news, None
                return {**news, "done": False}
            if isinstance(self._end, BaseException):
                raise self._end
            return {**self._seen, **(self._end or {}), "done": True}

    def cut(self) -> None:
        """End the run for being behind, unless it has ended; returns when that is written."""
        self._stop(CutShort(self._judged))

    def abandon(self) -> None:
        """End the run for another reason than its figures."""
        self._stop(SystemExit("the launch ended its round"))

    def _stop(self, verdict: BaseException) -> None:
        with self._changed:
            self._verdict = verdict
            self._changed.notify_all()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        end: dict[str, Any] | BaseException
        try:
            end = self._carry_out(self._report)
        except BaseException as error:
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _report(self, records: Sequence[EvaluationRecord]) -> None:
        with self._changed:
            for record in records:
                chosen = record.split == "validation" and record.metric == "ndcg"
                if chosen and record.k == 10 and record.value is not None:
                    self._ask(record.epoch, record.step, record.value)
            if self._verdict is not None:
                raise self._verdict

    def _ask(self, epoch: int, step: int, value: float) -> None:
        """Pass an evaluation on and wait a while for the verdict."""
        self._news = self._seen = {METRIC: value, TIME: epoch}
        self._judged = (
            f"cut short by {self._scheduler} after epoch {epoch} ({step} steps) with validation "
            f"NDCG@10 {value:.4f}"
        )
        self._may_go_on = False
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._may_go_on or self._verdict, ANSWER_SECONDS)
