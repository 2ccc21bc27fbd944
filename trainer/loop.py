"""Trains one run of a sweep: plain torch, every step measured, every stop with a reason."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from db.measures import Recorder, RunResult, StepRecord
from db.spec import RunSpec, RunStatus, run_key
from trainer.assembly import assemble
from trainer.checkpoint import Checkpoint, CheckpointFile
from trainer.data.batches import IntArray
from trainer.device import check_device, memory_shortage, warm_up
from trainer.evaluation import Evaluator
from trainer.gradients import gradient_histograms
from trainer.models.network import Predictions, SequenceModel
from trainer.outcome import Progress
from trainer.probe import MemoryProbe, release_memory, synchronise
from trainer.ranking import DEFAULT_BUDGET
from trainer.step import TrainingStep

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset


class TrainingInterrupted(Exception):
    """Training was told to stop before it was done."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run is carried out; nothing here changes what it learns.

    Attributes
    ----------
    step_rows_every : int
        Report every so many steps.
    evaluation_budget_bytes : int
        Bytes of scores that an evaluation holds at once.
    checkpoint_dir : Path, optional
        Folder for the checkpoint of the run. One that is there is resumed from; it is removed
        when the run ends.
    checkpoint_minutes : float
        Time between checkpoints.
    histograms_every : int, optional
        Record histograms of the final layer's gradients every so many steps.
    should_stop : callable, optional
        Asked after every step; once true, training saves a checkpoint and raises
        `TrainingInterrupted`.
    on_trained : callable, optional
        Given the model with its best weights and the result of a run that is done.
    """

    step_rows_every: int = 1
    evaluation_budget_bytes: int = DEFAULT_BUDGET
    checkpoint_dir: Path | None = None
    checkpoint_minutes: float = 10.0
    histograms_every: int | None = None
    should_stop: Callable[[], bool] | None = None
    on_trained: Callable[[SequenceModel, RunResult], None] | None = None


def train(
    spec: RunSpec,
    dataset: "Dataset",
    recorder: Recorder,
    device: str | torch.device = "cpu",
    *,
    options: TrainOptions | None = None,
    initialise: Callable[[SequenceModel], object] | None = None,
) -> RunResult:
    """Train a model as specified, keep the weights of the best validation, and test those.

    Parameters
    ----------
    spec : RunSpec
        What to train; a null precision is resolved for the device.
    dataset : Dataset
        A prepared dataset.
    recorder : Recorder
        Takes step and evaluation rows; what it raises ends training and is passed on.
    device : str or torch.device
        Where to train.
    options : TrainOptions, optional
        How to carry the run out.
    initialise : callable, optional
        Given the model once its weights are drawn, to change them.

    Returns
    -------
    RunResult
        With status done, diverged (loss or gradient not finite) or out_of_memory.

    Raises
    ------
    SpecError
        The device, precision or number of negatives is not possible.
    TrainingInterrupted
        `options.should_stop` said so.
    """
    where = torch.device(device)
    spec = spec.resolved(where.type)
    check_device(spec, where)
    cuda_devices = [where] if where.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        warm_up(where)
        probe = MemoryProbe(where)
        run = _Run(spec, recorder, where, options or TrainOptions(), probe)
        try:
            run.build(dataset, initialise)
            result = run.train()
            run.remove_checkpoint()
            return result
        except (RuntimeError, MemoryError) as error:
            shortage = memory_shortage(error)
            if shortage is None:
                raise
            allocated = probe.read().allocated
            return run.result(
                RunStatus.OUT_OF_MEMORY,
                stop_reason="out_of_memory",
                error=str(error).splitlines()[0][:500],
                requested_bytes=shortage.requested,
                allocated_bytes=allocated,
                total_bytes=probe.total_bytes(),
            )
        finally:
            run.close()
            probe.close()
            release_memory(where)


class _Run:
    """One training run with everything that it holds."""

    def __init__(
        self,
        spec: RunSpec,
        recorder: Recorder,
        device: torch.device,
        options: TrainOptions,
        probe: MemoryProbe,
    ) -> None:
        self._spec = spec
        self._recorder = recorder
        self._device = device
        self._options = options
        self._probe = probe
        self._progress = Progress()
        self._num_parameters = 0
        self._best: dict[str, Tensor] = {}
        self._file: CheckpointFile | None = None
        self._saved_at = time.monotonic()

    def build(
        self, dataset: "Dataset", initialise: Callable[[SequenceModel], object] | None
    ) -> None:
        """Set up data, model, loss and optimizer."""
        spec, options = self._spec, self._options
        self._parts = assemble(
            spec,
            dataset,
            self._device,
            evaluation_budget_bytes=options.evaluation_budget_bytes,
        )
        self._model = self._parts.model
        if initialise is not None:
            initialise(self._model)
        self._num_parameters = self._parts.num_parameters
        self._take_step = TrainingStep(spec, self._parts)
        if options.checkpoint_dir is not None:
            key = run_key(spec, dataset.fingerprint)
            self._file = CheckpointFile(options.checkpoint_dir, key)
            self._resume(self._file.load(self._device))

    def train(self) -> RunResult:
        """Train until a reason to stop, then test the best weights."""
        reason = self._train_epochs()
        if reason == "diverged":
            return self.result(
                RunStatus.DIVERGED,
                stop_reason=reason,
                error=f"loss or gradient is not finite after {self._progress.step} steps; "
                "lower learning_rate or use another precision",
            )
        if self._best:
            self._model.load_state_dict(self._best)
        step = self._progress.best_step
        records = self._evaluate(self._parts.test, self._progress.step if step is None else step)
        result = self.result(RunStatus.DONE, stop_reason=reason, test=records)
        if self._options.on_trained is not None:
            self._options.on_trained(self._model, result)
        return result

    def result(self, status: RunStatus, **more: Any) -> RunResult:
        """Result of the run as it stands."""
        return self._progress.result(
            status,
            num_parameters=self._num_parameters,
            memory_source=self._probe.source,
            **more,
        )

    def remove_checkpoint(self) -> None:
        """Delete what was kept to resume from."""
        if self._file is not None:
            self._file.remove()

    def close(self) -> None:
        """Drop what takes memory, so that the next run of the process starts from nothing."""
        for name in ("_model", "_parts", "_take_step"):
            self.__dict__.pop(name, None)
        self._best = {}

    def _train_epochs(self) -> str:
        spec, progress = self._spec, self._progress
        every = spec.evaluate_every_steps
        while progress.epoch < spec.max_epochs:
            for users in self._parts.batches.epoch_users(progress.epoch, progress.batch):
                if not self._step(users):
                    return "diverged"
                progress.batch += 1
                if every and progress.step % every == 0 and self._validate():
                    return "patience"
                self._checkpoint_or_stop()
            progress.end_epoch()
            last = progress.epoch == spec.max_epochs
            due = every is None or (last and progress.last_validation != progress.step)
            if due and self._validate():
                return "patience"
        return "max_epochs"

    def _checkpoint_or_stop(self) -> None:
        options = self._options
        stop = options.should_stop is not None and options.should_stop()
        due = time.monotonic() - self._saved_at >= 60.0 * options.checkpoint_minutes
        if self._file is not None and (stop or due):
            self._file.save(
                Checkpoint(
                    self._model.state_dict(),
                    self._parts.optimizer.state_dict(),
                    self._parts.scaler.state_dict(),
                    self._best,
                    self._progress,
                )
            )
            self._saved_at = time.monotonic()
        if stop:
            raise TrainingInterrupted(f"stopped after {self._progress.step} steps")

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            return
        self._model.load_state_dict(checkpoint.model)
        self._parts.optimizer.load_state_dict(checkpoint.optimizer)
        self._parts.scaler.load_state_dict(checkpoint.scaler)
        self._progress = checkpoint.progress
        if checkpoint.best:
            self._hold_best(checkpoint.best)

    def _step(self, users: IntArray) -> bool:
        """One optimizer step; whether loss and gradient were finite."""
        progress, device = self._progress, self._device
        self._probe.reset_peak()
        synchronise(device)
        begin = time.perf_counter()
        outcome = self._take_step(users, progress.step)
        if not outcome.finite:
            return False
        synchronise(device)
        seconds = time.perf_counter() - begin
        memory = self._probe.read()
        every = self._options.histograms_every
        if every and progress.step % every == 0 and outcome.weight_grad is not None:
            self._record_histograms(outcome.made, outcome.weight_grad)
        progress.step_seconds.append(seconds)
        progress.tokens.append(outcome.num_tokens)
        progress.epoch_losses.append(outcome.loss)
        progress.peak_train_bytes = max(progress.peak_train_bytes, memory.peak)
        if progress.step % self._options.step_rows_every == 0:
            norm = outcome.gradient_norm
            self._recorder.step(
                StepRecord(
                    step=progress.step,
                    epoch=progress.epoch,
                    loss=outcome.loss,
                    gradient_norm=norm if math.isfinite(norm) else None,
                    learning_rate=self._spec.learning_rate,
                    step_seconds=seconds,
                    tokens=outcome.num_tokens,
                    allocated_bytes=memory.allocated,
                    reserved_bytes=memory.reserved,
                    peak_bytes=memory.peak,
                )
            )
        progress.step += 1
        return True

    def _record_histograms(self, made: Predictions, weight_grad: Tensor) -> None:
        bias = self._model.output_bias
        for record in gradient_histograms(
            self._progress.step,
            made.hidden.detach(),
            self._model.output_weight.detach(),
            made.targets,
            weight_grad,
            bias=None if bias is None else bias.detach(),
            filter_eps=self._spec.filter_eps,
        ):
            self._recorder.histogram(record)

    def _validate(self) -> bool:
        """Validate, keep the weights if they are the best; whether patience is at its end."""
        records = self._evaluate(self._parts.validation, self._progress.step)
        if self._progress.take_validation(records):
            self._keep_best()
        return self._progress.validations_since_best >= self._spec.patience

    def _keep_best(self) -> None:
        state = self._model.state_dict()
        if not self._best:
            self._hold_best({name: torch.empty_like(v, device="cpu") for name, v in state.items()})
        for name, value in state.items():
            self._best[name].copy_(value)

    def _hold_best(self, weights: dict[str, Tensor]) -> None:
        """Keep weights beside the model, uncounted where memory is this process's."""
        self._best = weights
        if self._device.type == "cpu":
            self._probe.exclude(sum(v.numel() * v.element_size() for v in weights.values()))

    def _evaluate(self, evaluator: Evaluator, step: int) -> list[Any]:
        release_memory(self._device)
        self._probe.reset_peak()
        self._model.eval()
        synchronise(self._device)
        begin = time.perf_counter()
        records = evaluator.evaluate(self._model, step=step, epoch=self._progress.epoch)
        synchronise(self._device)
        self._progress.evaluation_seconds.append(time.perf_counter() - begin)
        peak = self._probe.read().peak
        self._progress.peak_eval_bytes = max(self._progress.peak_eval_bytes, peak)
        self._model.train()
        self._recorder.evaluation(records)
        release_memory(self._device)
        return records
