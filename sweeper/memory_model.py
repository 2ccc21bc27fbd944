"""Memory of a training step from what it holds: an analytic sum per loss and model, calibrated.

The terms count bytes from the shapes alone. Calibration scales each term by a factor fitted to
measured runs of one memory source, since allocators, work spaces and fused kernels differ between
devices; factors without evidence stay at their analytic value of 1.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from db.errors import SearchError
from db.spec import RunSpec

Array = NDArray[np.float64]

_ACTIVATIONS_PER_BLOCK: Final = {"sasrec": 16, "bert4rec": 24}
"""Vectors of width d that a block keeps per token for its backward."""
_TERMS: Final = ("parameters", "optimizer", "gradients", "activations", "attention", "loss", "ids")
_STRENGTH: Final = 0.05
"""Weight of the analytic factors in a calibration, in relative error per unit of factor."""
_MIN_RUNS: Final = 3
_NUM_QUANTILES: Final = 100


@dataclass(frozen=True)
class Shape:
    """What memory depends on besides the specification: the dataset's sizes."""

    num_items: int
    """Catalog V."""
    mean_length: float
    """Training items per user."""
    length_quantiles: tuple[float, ...] = ()
    """Evenly spaced quantiles of the lengths; an exponential law stands in for them."""

    @classmethod
    def from_quantiles(cls, num_items: int, quantiles: Mapping[str, float]) -> Self:
        """Shape from length quantiles by level, as `dataset.json` records them.

        Parameters
        ----------
        num_items : int
            Catalog V.
        quantiles : mapping of str to float
            Level (0 to 1, as text) to length.
        """
        levels = sorted((float(level), float(length)) for level, length in quantiles.items())
        middles = (np.arange(_NUM_QUANTILES) + 0.5) / _NUM_QUANTILES
        logs = np.interp(middles, [p for p, _ in levels], [math.log(max(n, 1)) for _, n in levels])
        lengths = np.exp(logs)
        return cls(num_items, float(lengths.mean()), tuple(float(n) for n in lengths))

    def tokens_per_user(self, max_seq_len: int) -> float:
        """Mean number of items that a window of `max_seq_len` keeps of a user."""
        if self.length_quantiles:
            return float(np.mean(np.minimum(self.length_quantiles, max_seq_len)))
        return self.mean_length * -math.expm1(-max_seq_len / self.mean_length)

    def squared_tokens_per_user(self, max_seq_len: int) -> float:
        """Mean of the squared number of kept items, which attention grows with."""
        if self.length_quantiles:
            return float(np.mean(np.minimum(self.length_quantiles, max_seq_len) ** 2))
        ratio = max_seq_len / self.mean_length
        return 2 * self.mean_length**2 * (1 - (1 + ratio) * math.exp(-ratio))


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes of one optimizer step at its peak, by what holds them."""

    parameters: float
    """Weights, fp32."""
    optimizer: float
    """Moments of Adam, fp32."""
    gradients: float
    """Gradients of the weights, fp32."""
    activations: float
    """Hidden states kept for the backward."""
    attention: float
    """Attention weights of all heads."""
    loss: float
    """Logits, or gathered item vectors with their gradient."""
    ids: float
    """Sampled item ids."""

    @property
    def total(self) -> float:
        """Sum of all terms."""
        return float(sum(self.vector()))

    def vector(self) -> Array:
        """The terms in the order of the class, shape (7,)."""
        return np.array([getattr(self, name) for name in _TERMS], float)


def memory_terms(spec: RunSpec, shape: Shape, *, padded: bool = False) -> MemoryTerms:
    """Bytes that a training step of a run holds, term by term.

    Parameters
    ----------
    spec : RunSpec
        A null precision counts as fp32.
    shape : Shape
        Sizes of its dataset.
    padded : bool
        The trainer computes padded positions (the published runs); ours does not.

    References
    ----------
    "Faster and Memory-Efficient Training of Sequential Recommendation Models for Large Catalogs",
    section 3: parameters, optimizer, activations, logits.
    """
    width = spec.embedding_dim
    weights = _num_parameters(spec, shape.num_items)
    tokens = _largest_batch(spec, shape)
    rows = _users(spec) * spec.max_seq_len if padded else tokens
    squares = rows * spec.max_seq_len if padded else tokens * _mean_context(spec, shape)
    size = 2 if spec.precision in ("fp16", "bf16") else 4
    kept = _ACTIVATIONS_PER_BLOCK[spec.model] * spec.num_blocks + 8
    targets = tokens * (spec.mask_probability if spec.model == "bert4rec" else 1.0)
    loss, ids = _loss_bytes(spec, shape.num_items, targets, size)
    state = 1 / width if spec.optimizer == "rowwise_adam" else 1.0
    return MemoryTerms(
        parameters=4 * weights,
        optimizer=8 * weights * state,
        gradients=4 * weights,
        activations=kept * rows * width * size,
        attention=2 * spec.num_blocks * spec.num_heads * squares * size,
        loss=loss,
        ids=ids,
    )


def _largest_batch(spec: RunSpec, shape: Shape) -> float:
    """Tokens of the largest pass of an epoch: three standard deviations above the mean."""
    users = _users(spec)
    mean = shape.tokens_per_user(spec.max_seq_len)
    variance = max(shape.squared_tokens_per_user(spec.max_seq_len) - mean**2, 0.0)
    likely = users * mean + 3 * math.sqrt(users * variance)
    return min(likely, float(users * spec.max_seq_len))


def _users(spec: RunSpec) -> int:
    """Users in one forward and backward pass."""
    return spec.micro_batch_size or spec.batch_size


def _mean_context(spec: RunSpec, shape: Shape) -> float:
    """Keys that the average token may attend to, before the causal mask."""
    length = spec.max_seq_len
    return shape.squared_tokens_per_user(length) / max(shape.tokens_per_user(length), 1e-9)


def analytic_bytes(spec: RunSpec, shape: Shape) -> float:
    """Peak training memory of a run by the uncalibrated model, bytes."""
    return memory_terms(spec, shape).total


def _num_parameters(spec: RunSpec, num_items: int) -> float:
    width, inner = spec.embedding_dim, 1 if spec.model == "sasrec" else 4
    block = (4 + 2 * inner) * width**2 + (9 + inner) * width
    bias = num_items if spec.model == "bert4rec" else 0
    return float(num_items * width + bias + spec.max_seq_len * width + spec.num_blocks * block)


def _loss_bytes(spec: RunSpec, num_items: int, targets: float, size: int) -> tuple[float, float]:
    """Bytes of the loss's own tensors, and of its sampled ids."""
    width, negatives = spec.embedding_dim, spec.num_negatives or 0
    if spec.loss == "ce":
        return targets * num_items * size, 0.0
    if spec.loss in ("ce_minus", "bce"):
        # the gathered vectors and their gradient, then logits and their gradient
        gathered = 2 * targets * negatives * width * 4
        return gathered + 4 * targets * negatives * size, 8 * targets * negatives
    if spec.loss == "sce":
        buckets = spec.sce_alpha * math.sqrt(spec.sce_beta * max(targets, 1.0))
        per_bucket = spec.sce_alpha * math.sqrt(max(targets, 1.0) / spec.sce_beta)
        rows = spec.sce_bucket_size_x or per_bucket
        return buckets * (num_items + 2 * rows * spec.sce_bucket_size_y) * size, 0.0
    # kernels keep neither logits nor ids: only the gradient of the hidden states and, for the
    # cast of the item vectors, one copy of the table in low precision
    return 2 * targets * width * 4 + (num_items * width * size if size < 4 else 0), 0.0


@dataclass(frozen=True)
class Prediction:
    """Bytes with an interval of 90 % of the calibration's relative errors."""

    bytes: float
    low: float
    high: float


@dataclass(frozen=True)
class MemoryModel:
    """Analytic terms, each scaled by a factor, plus a constant.

    Attributes
    ----------
    factors : dict of str to float
        Factor of each term; 1 is the analytic value.
    constant_bytes : float
        What every run holds.
    relative_errors : tuple of float
        Predicted over measured minus 1, of each run of the calibration with that run left out.
    """

    factors: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(_TERMS, 1.0)
    )
    constant_bytes: float = 0.0
    relative_errors: tuple[float, ...] = ()
    padded: bool = False
    """Whether the measured trainer computes padded positions."""

    @property
    def num_runs(self) -> int:
        """Measured runs that the factors rest on."""
        return len(self.relative_errors)

    def predict(self, spec: RunSpec, shape: Shape) -> Prediction:
        """Peak training memory of a run; the interval is as wide as the errors were.

        Without calibration the interval spans a factor of two each way.
        """
        scale = np.array([self.factors[name] for name in _TERMS])
        middle = self.constant_bytes + float(
            scale @ memory_terms(spec, shape, padded=self.padded).vector()
        )
        if not self.relative_errors:
            return Prediction(middle, middle / 2, middle * 2)
        # a finite sample of n errors covers 90 % at its n-corrected quantile
        rank = min(1.0, 0.9 * (1 + 1 / self.num_runs))
        width = float(np.quantile(np.abs(np.log1p(self.relative_errors)), rank))
        return Prediction(middle, middle * math.exp(-width), middle * math.exp(width))


def calibrate(
    specs: Sequence[RunSpec],
    shapes: Sequence[Shape],
    measured: Sequence[float],
    *,
    padded: bool = False,
    with_errors: bool = True,
) -> MemoryModel:
    """Fit the factors to measured peaks of one memory source and device class.

    Least squares of the relative errors with non-negative factors, drawn weakly to their analytic
    values, so that a term that the runs do not vary keeps its own.

    Parameters
    ----------
    specs : sequence of RunSpec
        Finished runs.
    shapes : sequence of Shape
        Sizes of the dataset of each.
    measured : sequence of float
        Peak training memory of each, bytes.
    padded : bool
        Whether the measured trainer computes padded positions.
    with_errors : bool
        Refit without each run in turn to learn how far predictions are off.

    Raises
    ------
    SearchError
        Fewer than three runs, or a peak that is not positive.
    """
    peaks = np.asarray(measured, float)
    if len(peaks) < _MIN_RUNS:
        raise SearchError(
            f"{len(peaks)} measured runs cannot calibrate the memory model; it takes at least "
            f"{_MIN_RUNS} of different sizes"
        )
    if not (np.isfinite(peaks) & (peaks > 0)).all():
        raise SearchError("a measured peak memory is not above 0; leave that run out")
    terms = np.array(
        [memory_terms(s, h, padded=padded).vector() for s, h in zip(specs, shapes, strict=True)]
    )
    design, target, prior = _system(terms, peaks)
    factors = _solve(design, target, prior)
    errors = [
        float(design[i] @ _solve(np.delete(design, i, 0), np.delete(target, i), prior) - 1)
        for i in range(len(peaks) if with_errors else 0)
    ]
    unit = prior[1]
    return MemoryModel(
        dict(zip(_TERMS, factors[:-1], strict=True)),
        float(factors[-1] * unit),
        tuple(errors),
        padded,
    )


def _system(terms: Array, peaks: Array) -> tuple[Array, Array, tuple[Array, float]]:
    """Relative design matrix with a constant of the size of the smallest run, and the prior."""
    unit = float(peaks.min())
    design = np.column_stack([terms, np.full(len(peaks), unit)]) / peaks[:, None]
    return design, np.ones(len(peaks)), (np.append(np.ones(len(_TERMS)), 0.0), unit)


def _solve(design: Array, target: Array, prior: tuple[Array, float]) -> Array:
    """Non-negative factors; squared errors above 20 % weigh less (iteratively reweighted)."""
    center = prior[0]
    weight = np.ones(len(target))
    solution = center
    for _ in range(5):
        rows = np.vstack([design * weight[:, None], _STRENGTH * np.eye(len(center))])
        right = np.concatenate([target * weight, _STRENGTH * center])
        solution = nnls(rows, right)[0]
        error = np.abs(design @ solution - 1)
        weight = np.sqrt(np.minimum(1, 0.2 / np.maximum(error, 1e-9)))
    result: Array = solution
    return result
