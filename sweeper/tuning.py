"""The Ray Tune side: one trial is one run; Tune schedules, the database remembers."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from sweeper.plan import Slot, Task
from sweeper.worker import WorkerSettings, execute


class RunTrainable(tune.Trainable):
    """A trial that carries out the run named in its config in one step."""

    def setup(self, config: dict[str, Any], settings: WorkerSettings | None = None) -> None:
        """Keep the settings; they come through the object store, never through the config."""
        assert settings is not None, "with_parameters gives them"
        self._settings = settings

    def step(self) -> dict[str, Any]:
        """Carry out the whole run."""
        task = self.config["task"]
        slot = Slot(task["cpus"], task["gpus"], task["whole"])
        return {**execute(task["key"], self._settings, slot), "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run in the same process."""
        self.config = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the database is the record."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Load nothing."""


_rounds: dict[str, tuple[Callable[[dict[str, Any]], None], Callable[[], None]]] = {}


class _Feed(tune.Callback):
    """Passes on what workers returned; touches neither disk nor network.

    Tune copies and pickles its callbacks, so only the name of the round is kept here.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        _rounds[self._name][1]()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        _rounds[self._name][0](dict(trial.last_result or {}))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        _rounds[self._name][0]({"key": trial.config["task"]["key"], "outcome": "vanished"})


def run_tasks(
    tasks: Sequence[Task],
    settings: WorkerSettings,
    folder: Path,
    take: Callable[[dict[str, Any]], None],
    check: Callable[[], None],
    *,
    max_concurrent: int | None = None,
) -> list[str]:
    """Have Ray Tune carry out runs, in their order as far as resources allow.

    Parameters
    ----------
    tasks : sequence of Task
        What to carry out.
    settings : WorkerSettings
        For the workers.
    folder : Path
        Where Tune may keep its own files.
    take : callable
        Called in this thread with what each worker returned.
    check : callable
        Called in this thread several times a second; what it raises ends the round.
    max_concurrent : int, optional
        Most runs at a time.

    Returns
    -------
    list of str
        One line for each trial that raised instead of returning.
    """
    name = f"round-{len(list(folder.glob('round-*')))}"
    on_gpus = any(task.slot.gpus for task in tasks)
    configs = [{"key": task.key, **dataclasses.asdict(task.slot)} for task in tasks]
    trainable = tune.with_resources(
        tune.with_parameters(RunTrainable, settings=settings), _resources
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"task": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=max_concurrent,
            reuse_actors=not on_gpus,  # leftovers in GPU memory would falsify the next figures
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            callbacks=[_Feed(name)],
        ),
    )
    _rounds[name] = (take, check)
    try:
        results = tuner.fit()
    finally:
        del _rounds[name]
    return [_first_cause(error) for error in results.errors]


def _trial_id(trial: Any) -> str:
    return str(trial.trial_id)


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    task = config["task"]
    gpu = {"GPU": task["gpus"]} if task["gpus"] else {}
    return tune.PlacementGroupFactory([{"CPU": task["cpus"], **gpu}])


def _first_cause(error: BaseException) -> str:
    """Last line of a Ray error: what was raised in the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
