"""The Ray Tune side of a worker: what a trial does.

Every worker process imports this, so it imports nothing that only the planner needs.
"""

import functools
from typing import Any

from ray import tune

from sweeper.early_stopping import Conversation
from sweeper.plan import Slot
from sweeper.worker import WorkerSettings, execute


class RunTrainable(tune.Trainable):
    """A trial that carries out the run named in its config.

    In one step; with a scheduler that may cut runs short, in one step for each evaluation.
    """

    def setup(self, config: dict[str, Any], settings: WorkerSettings | None = None) -> None:
        """Keep the settings; they come through the object store, never through the config."""
        assert settings is not None, "with_parameters gives them"
        self._settings = settings
        self._conversation: Conversation | None = None

    def step(self) -> dict[str, Any]:
        """Carry out the run, or go on with it until its next evaluation."""
        task, early_stopping = self.config["task"], self._settings.early_stopping
        slot = Slot(**{name: value for name, value in task.items() if name != "key"})
        if early_stopping is None:
            return {**execute(task["key"], self._settings, slot), "done": True}
        if self._conversation is None:
            carry_out = functools.partial(execute, task["key"], self._settings, slot)
            self._conversation = Conversation(carry_out, early_stopping.scheduler)
        result = self._conversation.next()
        if result["done"]:
            self._conversation = None
        return result

    def cut_short(self) -> None:
        """End the run: the scheduler has decided so."""
        if self._conversation is not None:
            self._conversation.cut()
            self._conversation = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next run in the same process."""
        self.cleanup()
        self.config = new_config
        return True

    def cleanup(self) -> None:
        """Let go of a run that did not end."""
        if self._conversation is not None:
            self._conversation.abandon()
            self._conversation = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: the database is the record."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Load nothing."""


def placement(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """What Ray is to reserve for a trial."""
    task = config["task"]
    bundle = {"CPU": task["cpus"]}
    if task["gpus"]:
        bundle["GPU"] = task["gpus"]
    if task["accelerator"]:
        bundle[f"accelerator_type:{task['accelerator']}"] = 0.001
    return tune.PlacementGroupFactory([bundle])
