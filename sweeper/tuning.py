"""The Ray Tune side of the driver: one trial is one run; Tune schedules, the database remembers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from sweeper.agenda import Agenda
from sweeper.early_stopping import METRIC, TIME
from sweeper.trainable import RunTrainable, placement
from sweeper.worker import WorkerSettings


@dataclasses.dataclass(frozen=True)
class Round:
    """What Ray Tune asks and tells while it carries out one round; all in its own thread."""

    agenda: Agenda
    take: Callable[[dict[str, Any]], None]
    """Called with what each worker returned."""
    check: Callable[[], None]
    """Called several times a second; what it raises ends the round."""
    refill: Callable[[], bool]
    """Called when nothing is left to start; whether it could look for more."""


_rounds: dict[str, Round] = {}
"""By name: Tune copies and pickles its callbacks and searchers, so they hold the name alone."""


class _Feed(tune.Callback):
    """Passes on what workers returned; touches neither disk nor network."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        _rounds[self._name].check()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        key, result = trial.config["task"]["key"], dict(trial.last_result or {})
        if "outcome" not in result:
            # the scheduler's decision; Tune itself would stop a worker without saying why
            trial.temporary_state.ray_actor.cut_short.remote()
            at = f"after epoch {result.get(TIME)}, validation NDCG@10 {result.get(METRIC):.4f}"
            result = {"key": key, "outcome": "cut", "error": at}
        self._end(key, result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        key = trial.config["task"]["key"]
        self._end(key, {"key": key, "outcome": "vanished"})

    def _end(self, key: str, result: dict[str, Any]) -> None:
        _rounds[self._name].agenda.ended(key, started=result.get("outcome") != "vanished")
        _rounds[self._name].take(result)


class _Planned(Searcher):
    """Hands out the agenda's runs whenever there is room, until nothing more comes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **_: Any) -> bool:
        """Take nothing: the agenda knows what to run."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Next run, None to be asked again, or that there are no more."""
        now = _rounds[self._name]
        task = now.agenda.next()
        if task is None and now.agenda.is_idle:
            if not now.refill():
                return None
            task = now.agenda.next()
            if task is None:
                return Searcher.FINISHED
        if task is None:
            return None
        return {"task": {"key": task.key, **dataclasses.asdict(task.slot)}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the database is the record."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


def run_round(now: Round, settings: WorkerSettings, folder: Path, *, reuse: bool) -> list[str]:
    """Have Ray Tune carry out what an agenda hands out, until it hands out nothing more.

    Parameters
    ----------
    now : Round
        What to run, and whom to tell.
    settings : WorkerSettings
        For the workers.
    folder : Path
        Where Tune may keep its own files.
    reuse : bool
        Let a worker process take one run after another.

    Returns
    -------
    list of str
        One line for each trial that raised instead of returning.
    """
    name = f"round-{len(list(folder.glob('round-*')))}"
    trainable = tune.with_resources(
        tune.with_parameters(RunTrainable, settings=settings), placement
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=_Planned(name),
            scheduler=_scheduler(settings),
            reuse_actors=reuse,
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            # the default saves at the end, which fails where nodes share no file system
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_Feed(name)],
        ),
    )
    _rounds[name] = now
    try:
        results = tuner.fit()
    finally:
        del _rounds[name]
    return [_first_cause(error) for error in results.errors]


def _scheduler(settings: WorkerSettings) -> TrialScheduler | None:
    """What decides whether a run goes on after an evaluation; None where all do."""
    chosen = settings.early_stopping
    if chosen is None:
        return None
    if chosen.scheduler == "median":
        return MedianStoppingRule(
            time_attr=TIME,
            metric=METRIC,
            mode="max",
            grace_period=chosen.grace_epochs,
            min_samples_required=chosen.min_runs,
            min_time_slice=float("inf"),  # type: ignore[arg-type]  # or it would pause runs
        )
    return ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=settings.longest_epochs,
        grace_period=chosen.grace_epochs,
        reduction_factor=chosen.reduction_factor,
        stop_last_trials=False,
    )


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


def _first_cause(error: BaseException) -> str:
    """Last line of a Ray error: what was raised in the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
