"""Trains one run of a sweep: plain torch, every step measured, every stop with a reason."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from db.measures import Recorder, RunResult, StepRecord
from db.spec import RunSpec, RunStatus, run_key
from trainer.checkpoint import Checkpoint, CheckpointFile
from trainer.data.batches import PackedBatch, PackedSequences, TrainingBatches, item_tensor
from trainer.device import check_device, memory_shortage, warm_up
from trainer.evaluation import Evaluator, metric_frame
from trainer.gradients import gradient_histograms
from trainer.losses import make_loss
from trainer.models.build import build_model
from trainer.models.network import Predictions, SequenceModel
from trainer.optimizers import make_optimizer
from trainer.outcome import Progress
from trainer.probe import MemoryProbe, release_memory, synchronise
from trainer.ranking import DEFAULT_BUDGET
from trainer.seeds import derive

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        spec = self._spec
        counts = torch.from_numpy(np.array(dataset.item_counts)).to(self._device)
        self._loss = make_loss(spec, dataset.num_items, counts)
        items = item_tensor(dataset.items, self._device)
        self._batches = training_batches(spec, items, dataset)
        self._validation = evaluator(spec, items, dataset, "validation", self._options)
        self._test = evaluator(spec, items, dataset, "test", self._options)
        self._model = build_model(spec, dataset.num_items).to(self._device)
        generator = torch.Generator(self._device).manual_seed(derive(spec.seed, "weights"))
        self._model.reset_parameters(generator)
        if initialise is not None:
            initialise(self._model)
        self._parameters = list(self._model.parameters())
        self._num_parameters = sum(p.numel() for p in self._parameters)
        self._optimizer = make_optimizer(
            spec.optimizer, self._parameters, item_tables(self._model), spec.learning_rate
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=spec.precision == "fp16")
        if self._options.checkpoint_dir is not None:
            key = run_key(spec, dataset.fingerprint)
            self._file = CheckpointFile(self._options.checkpoint_dir, key)
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
        records = self._evaluate(self._test, self._progress.step if step is None else step)
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
        for name in ("_model", "_optimizer", "_parameters", "_batches", "_validation", "_test"):
            self.__dict__.pop(name, None)
        self._best = {}

    def _train_epochs(self) -> str:
        spec, progress = self._spec, self._progress
        every = spec.evaluate_every_steps
        while progress.epoch < spec.max_epochs:
            for batch in self._batches.epoch(progress.epoch, progress.batch):
                if not self._step(batch):
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
                    self._optimizer.state_dict(),
                    self._scaler.state_dict(),
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
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self._scaler.load_state_dict(checkpoint.scaler)
        self._progress = checkpoint.progress
        if checkpoint.best:
            self._hold_best(checkpoint.best)

    def _step(self, batch: PackedBatch) -> bool:
        """One optimizer step; whether loss and gradient were finite."""
        spec, progress, device = self._spec, self._progress, self._device
        self._probe.reset_peak()
        synchronise(device)
        begin = time.perf_counter()
        torch.manual_seed(derive(spec.seed, "dropout", progress.step))
        with self._autocast():
            made = self._model.predictions(batch, derive(spec.seed, "masks", progress.step))
            loss = self._loss(
                made, self._model.output_weight, self._model.output_bias, progress.step
            )
        torch.autograd.backward(self._scaler.scale(loss))
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self._parameters if p.grad is not None]
        )
        loss_value, norm_value = torch.stack([loss.detach().float(), norm.float()]).tolist()
        finite = math.isfinite(loss_value) and (
            math.isfinite(norm_value) or self._scaler.is_enabled()
        )
        if not finite:
            return False
        self._scaler.step(self._optimizer)
        self._scaler.update()
        weight_grad = self._model.output_weight.grad
        self._optimizer.zero_grad(set_to_none=True)
        every = self._options.histograms_every
        if not every or progress.step % every:
            weight_grad = None
        synchronise(device)
        seconds = time.perf_counter() - begin
        memory = self._probe.read()
        if weight_grad is not None:
            self._record_histograms(made, weight_grad)
        progress.step_seconds.append(seconds)
        progress.tokens.append(batch.num_tokens)
        progress.epoch_losses.append(loss_value)
        progress.peak_train_bytes = max(progress.peak_train_bytes, memory.peak)
        if progress.step % self._options.step_rows_every == 0:
            self._recorder.step(
                StepRecord(
                    step=progress.step,
                    epoch=progress.epoch,
                    loss=loss_value,
                    gradient_norm=norm_value if math.isfinite(norm_value) else None,
                    learning_rate=spec.learning_rate,
                    step_seconds=seconds,
                    tokens=batch.num_tokens,
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
        records = self._evaluate(self._validation, self._progress.step)
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

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _AUTOCAST.get(self._spec.precision or "fp32")
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype)


def item_tables(model: SequenceModel) -> list[torch.nn.Parameter]:
    """Parameters of a model with one vector per item."""
    num_items = len(model.output_weight)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and len(parameter) == num_items and "position" not in name
    ]


def training_batches(spec: RunSpec, items: Tensor, dataset: "Dataset") -> TrainingBatches:
    """Training batches as the spec asks for them, gathered from `items`."""
    next_items = spec.model == "sasrec"
    sequences = PackedSequences(
        items, dataset.train, max_seq_len=spec.max_seq_len, next_items=next_items
    )
    padded = spec.predict_first_item or spec.count_padding
    return TrainingBatches(
        sequences,
        batch_size=spec.batch_size,
        min_tokens=0 if padded else 1,
        seed=spec.seed,
    )


def evaluator(
    spec: RunSpec, items: Tensor, dataset: "Dataset", split: Any, options: TrainOptions
) -> Evaluator:
    """Evaluation of a split as the spec asks for it."""
    validation = split == "validation"
    return Evaluator(
        items,
        dataset.validation if validation else dataset.test,
        split=split,
        frame=metric_frame(dataset, spec.metric_frame, split),
        max_seq_len=spec.max_seq_len,
        mask_seen=spec.mask_seen,
        budget_bytes=options.evaluation_budget_bytes,
        max_users=spec.max_validation_users if validation else None,
    )
