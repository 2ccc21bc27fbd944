"""What takes the memory and the time of a training step, part by part.

Memory is followed tensor by tensor: every tensor that an operation makes is counted from then
until its last reference is gone, under the part of the step that made it. That is exact for
tensors and the same on every device; what libraries take inside an operation is not seen, and
shows as the difference to the measured peak.
"""

import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from db.errors import DataError
from db.measures import MemorySource
from db.spec import RunSpec
from trainer.assembly import Assembly, assemble
from trainer.data.batches import IntArray
from trainer.device import check_device, memory_shortage, warm_up
from trainer.probe import MemoryProbe, release_memory, synchronise
from trainer.ranking import DEFAULT_BUDGET
from trainer.step import PHASES, Phase, TrainingStep

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

_WARM_UP_STEPS = 2

PartName = Literal[
    "parameters", "optimizer state", "gradients", "activations", "loss", "temporary", "evaluation"
]
PARTS: tuple[PartName, ...] = (
    "parameters", "optimizer state", "gradients", "activations", "loss", "temporary",
)  # fmt: skip
"""Parts of the memory of a training step."""

_PART_OF_PHASE: dict[str, PartName] = {
    "batch": "activations",
    "network": "activations",
    "loss": "loss",
    "network backward": "temporary",
    "optimizer": "temporary",
    "evaluation": "evaluation",
}


@dataclass(frozen=True)
class StepProfile:
    """Memory and time of the training steps of a run.

    Attributes
    ----------
    step_bytes : dict of str to int
        Bytes per part (`PARTS`) at the moment of a step when tensors take most; of the step
        that takes most.
    evaluation_bytes : int
        Bytes of tensors that evaluation takes at most, besides parameters and optimizer state.
    measured_step_bytes, measured_evaluation_bytes : int
        Peaks as runs record them: of the allocator on CUDA, resident on a CPU.
    memory_source : {"cuda_allocated", "resident"}
    phase_seconds : dict of str to float
        Median seconds per phase (`trainer.step.PHASES`).
    step_seconds : float
        Median seconds of a step.
    tokens_per_second : float
        Input tokens, none of them padded.
    num_steps : int
        Steps that the times rest on, warm-up steps not counted.
    num_parameters : int
    """

    step_bytes: dict[PartName, int]
    evaluation_bytes: int
    measured_step_bytes: int
    measured_evaluation_bytes: int
    memory_source: MemorySource
    phase_seconds: dict[Phase, float]
    step_seconds: float
    tokens_per_second: float
    num_steps: int
    num_parameters: int


def profile(
    spec: RunSpec,
    dataset: "Dataset",
    device: str | torch.device = "cpu",
    *,
    num_steps: int = 10,
    evaluation_budget_bytes: int = DEFAULT_BUDGET,
) -> StepProfile:
    """Take some training steps and one evaluation, and say what each part of them costs.

    Parameters
    ----------
    spec : RunSpec
        What to train; a null precision is resolved for the device.
    dataset : Dataset
    device : str or torch.device
    num_steps : int
        Steps to time after the first two; at most what one epoch has. Half as many, those of
        the most tokens, are followed tensor by tensor.
    evaluation_budget_bytes : int
        Bytes of scores that an evaluation holds at once.

    Raises
    ------
    SpecError
        The device, precision or number of negatives is not possible.
    DataError
        Loss or gradient is not finite within these steps, or memory does not suffice for them.
    """
    where = torch.device(device)
    spec = spec.resolved(where.type)
    check_device(spec, where)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        warm_up(where)
        probe = MemoryProbe(where)
        try:
            parts = assemble(spec, dataset, where, evaluation_budget_bytes=evaluation_budget_bytes)
            run = _Profiler(spec, parts, where, probe)
            return run.profile(num_steps)
        except (RuntimeError, MemoryError) as error:
            shortage = memory_shortage(error)
            if shortage is None:
                raise
            asked = (
                "" if shortage.requested is None else f", {shortage.requested:,} bytes asked for"
            )
            raise DataError(
                f"memory does not suffice for a step{asked} of {probe.total_bytes():,}: lower "
                "batch_size or micro_batch_size, or use a loss without logits"
            ) from error
        finally:
            probe.close()
            release_memory(where)


class TensorTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors by the part of the program that made them.

    Parameters
    ----------
    known : iterable of Tensor
        Tensors that are there before; they are not counted.
    gradient_shapes : set of tuple of int
        Shapes of parameters: what the backward pass makes in such a shape is a gradient.
    """

    def __init__(
        self, known: Iterable[Tensor], gradient_shapes: frozenset[tuple[int, ...]] = frozenset()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._gradient_shapes = gradient_shapes
        self._alive: dict[int, tuple[PartName, int, object]] = {}
        self._now: Counter[PartName] = Counter()
        self.phase: str = "network"
        self.peak: Counter[PartName] = Counter()

    def reset_peak(self) -> None:
        """Begin a new period for the peak."""
        self.peak = Counter(self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        opaque = OPDEFS.get(func._schema.name)
        if opaque is None:
            made = func(*args, **(kwargs or {}))
        else:
            # an operator of ours: go into it, instead of seeing its result alone
            with self:
                made = opaque._init_fn(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._count(value)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        part = _PART_OF_PHASE[self.phase]
        if part in ("loss", "temporary") and tuple(tensor.shape) in self._gradient_shapes:
            part = "gradients"
        size = storage.nbytes()
        self._alive[key] = (part, size, weakref.ref(storage, lambda _: self._forget(key)))
        self._now[part] += size
        if self._now.total() > self.peak.total():
            self.peak = Counter(self._now)

    def _forget(self, key: int) -> None:
        part, size, _ = self._alive.pop(key)
        self._now[part] -= size


class _Profiler:
    """Steps of one run, timed, measured and followed."""

    def __init__(
        self,
        spec: RunSpec,
        parts: Assembly,
        device: torch.device,
        probe: MemoryProbe,
    ) -> None:
        self._parts = parts
        self._device = device
        self._probe = probe
        self._tracker: TensorTracker | None = None
        self._marks: list[tuple[Phase, float]] = []
        self._take_step = TrainingStep(spec, parts, on_phase=self._enter)
        self._num_taken = 0

    def profile(self, num_steps: int) -> StepProfile:
        batches = list(islice(self._parts.batches.epoch_users(0), _WARM_UP_STEPS + num_steps))
        for users in batches[:_WARM_UP_STEPS]:
            self._step(users)
        timed = batches[_WARM_UP_STEPS:] or batches
        measured = [self._measured_step(users) for users in timed]
        tokens = [found[0] for found in measured]
        largest = sorted(range(len(timed)), key=tokens.__getitem__)[-max(len(timed) // 2, 1) :]
        with self._tracking() as tracker:
            for number in largest:
                self._step(timed[number])
            held = self._held()
            step_peak = {**{part: 0 for part in PARTS}, **tracker.peak, **held}
        evaluation_bytes, measured_evaluation = self._evaluation()
        seconds = [sum(phases.values()) for _, _, phases in measured]
        return StepProfile(
            step_bytes=step_peak,
            evaluation_bytes=evaluation_bytes,
            measured_step_bytes=max(found[1] for found in measured),
            measured_evaluation_bytes=measured_evaluation,
            memory_source=self._probe.source,
            phase_seconds={
                phase: median(found[2][phase] for found in measured) for phase in PHASES
            },
            step_seconds=median(seconds),
            tokens_per_second=sum(tokens) / sum(seconds),
            num_steps=len(timed),
            num_parameters=self._parts.num_parameters,
        )

    def _step(self, users: IntArray) -> int:
        outcome = self._take_step(users, self._num_taken)
        self._num_taken += 1
        if not outcome.finite:
            raise DataError(
                f"loss or gradient is not finite in step {self._num_taken}: nothing to profile; "
                "lower learning_rate or use another precision"
            )
        return outcome.num_tokens

    def _measured_step(self, users: IntArray) -> tuple[int, int, dict[Phase, float]]:
        """Tokens, peak bytes and seconds per phase of a step."""
        self._probe.reset_peak()
        synchronise(self._device)
        self._marks = []
        tokens = self._step(users)
        synchronise(self._device)
        ends = [begin for _, begin in self._marks[1:]] + [time.perf_counter()]
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), end in zip(self._marks, ends, strict=True):
            seconds[phase] += end - begin
        return tokens, self._probe.read().peak, seconds

    def _enter(self, phase: Phase) -> None:
        if self._tracker is not None:
            self._tracker.phase = phase
        synchronise(self._device)
        self._marks.append((phase, time.perf_counter()))

    @contextmanager
    def _tracking(self) -> Iterator[TensorTracker]:
        shapes = frozenset(tuple(p.shape) for p in self._parts.parameters if p.dim() == 2)
        known = [self._parts.items, *self._parts.parameters, *self._optimizer_state()]
        self._tracker = TensorTracker(known, shapes)
        try:
            with self._tracker as tracker:
                yield tracker
        finally:
            self._tracker = None

    def _evaluation(self) -> tuple[int, int]:
        """Most bytes of tensors, and the measured peak."""
        evaluator, model = self._parts.validation, self._parts.model.eval()
        release_memory(self._device)
        self._probe.reset_peak()
        evaluator.evaluate(model, step=0, epoch=0)
        synchronise(self._device)
        measured = self._probe.read().peak
        with self._tracking() as tracker:
            tracker.phase = "evaluation"
            evaluator.evaluate(model, step=0, epoch=0)
        return tracker.peak.total(), measured

    def _held(self) -> dict[PartName, int]:
        """Bytes that are there throughout."""
        return {
            "parameters": sum(p.nbytes for p in self._parts.parameters),
            "optimizer state": sum(value.nbytes for value in self._optimizer_state()),
        }

    def _optimizer_state(self) -> list[Tensor]:
        states = self._parts.optimizer.state.values()
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]
