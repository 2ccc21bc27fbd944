"""How much device memory a run will need, from finished runs first and a formula last."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from db.spec import RunSpec
from sweeper.feasibility import at_least, same_sizes, shape_of_memory
from sweeper.memory_model import MemoryModel, Shape, calibrate
from sweeper.plan import CONTEXT_BYTES

FRAGMENTATION: Final = 1.15
"""Reserved over allocated bytes that a share of a GPU leaves room for."""
MARGIN: Final = 1.05
"""Room above a measured peak of the same sizes: batches of another seed are a little longer."""
MIN_CALIBRATION: Final = 8
"""Finished runs of a model and loss from which a calibrated model beats the bare formula."""
_MAX_CALIBRATION: Final = 48


@dataclass(frozen=True)
class Measured:
    """The peak memory of a finished run."""

    spec: RunSpec
    peak_bytes: float


@dataclass(frozen=True)
class Forecast:
    """Bytes that a run will need at its peak."""

    expected: float
    upper: float
    """What at most one run in ten exceeds, by the evidence."""
    evidence: str
    """`repeat` (same sizes measured), `larger` (a larger run measured), `model`, `formula`."""


class MemoryForecaster:
    """Predicts peak memory of runs on one kind of device.

    Parameters
    ----------
    shapes : mapping of str to Shape
        Sizes of each dataset by name.
    measured : sequence of Measured
        Finished runs on devices of this kind.
    padded : bool
        The measured trainer computes padded positions (published runs); ours does not.
    """

    def __init__(
        self, shapes: Mapping[str, Shape], measured: Sequence[Measured], *, padded: bool = False
    ) -> None:
        self._shapes = shapes
        self._padded = padded
        self._known: dict[object, Forecast] = {}
        self._by_kind: dict[object, list[Measured]] = {}
        by_loss: dict[tuple[str, str], list[Measured]] = {}
        for run in measured:
            self._by_kind.setdefault(shape_of_memory(run.spec), []).append(run)
            by_loss.setdefault((run.spec.model, run.spec.loss), []).append(run)
        self._models = {
            loss: self._fit(runs) for loss, runs in by_loss.items() if len(runs) >= MIN_CALIBRATION
        }

    def _fit(self, runs: Sequence[Measured]) -> MemoryModel:
        # spread over all sizes; a fit per run left out is what makes this slow
        step = max(1, math.ceil(len(runs) / _MAX_CALIBRATION))
        chosen = sorted(runs, key=lambda run: run.peak_bytes)[::step]
        return calibrate(
            [run.spec for run in chosen],
            [self._shapes[run.spec.dataset] for run in chosen],
            [run.peak_bytes for run in chosen],
            padded=self._padded,
        )

    def predict(self, spec: RunSpec) -> Forecast:
        """Peak memory of a run, bytes.

        Parameters
        ----------
        spec : RunSpec
            Of one of the datasets given.
        """
        kind = shape_of_memory(spec)
        sizes = (kind, spec.batch_size, spec.max_seq_len, spec.num_negatives)
        if sizes not in self._known:
            self._known[sizes] = self._predict(spec, self._by_kind.get(kind, []))
        return self._known[sizes]

    def _predict(self, spec: RunSpec, runs: Sequence[Measured]) -> Forecast:
        repeats = [run.peak_bytes for run in runs if same_sizes(run.spec, spec)]
        if repeats:
            return Forecast(max(repeats), MARGIN * max(repeats), "repeat")
        model = self._models.get((spec.model, spec.loss), MemoryModel(padded=self._padded))
        made = model.predict(spec, self._shapes[spec.dataset])
        evidence = "model" if model.num_runs else "formula"
        found = Forecast(made.bytes, MARGIN * made.high, evidence)
        above = [run.peak_bytes for run in runs if at_least(run.spec, spec)]
        if above and MARGIN * min(above) < found.upper:
            return Forecast(min(found.expected, min(above)), MARGIN * min(above), "larger")
        return found


def gpu_share(upper_bytes: float, device_bytes: float) -> float:
    """Share of a GPU that a run is given, in hundredths; 1 when it would have most of it anyway.

    Parameters
    ----------
    upper_bytes : float
        Peak of its tensors, bytes.
    device_bytes : float
        Memory of the GPU, bytes.
    """
    needed = (CONTEXT_BYTES + FRAGMENTATION * upper_bytes) / device_bytes
    share = max(0.01, math.ceil(100 * needed) / 100)
    return 1.0 if share > 0.9 else share
