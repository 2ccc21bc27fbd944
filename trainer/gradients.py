"""How the gradients of the final layer are distributed, and how many are too small to matter."""

import math

import numpy as np
import torch
from torch import Tensor

from db.measures import HistogramRecord

SMALLEST_FP16 = 2.0**-24
"""5.96e-8, the smallest number above 0 in fp16: half of it and less become 0."""
_DECADES = (-14, 2)
_PER_DECADE = 4
_TOKENS = 256
_TOP = 1e6


def histogram_edges(filter_eps: float | None = None) -> tuple[float, ...]:
    """Edges 0, four per decade from 1e-14 to 100, 1e6; besides 5.96e-8 and `filter_eps`.

    The shares below 5.96e-8 and below `filter_eps` are therefore sums of whole bins.
    """
    low, high = _DECADES
    steps = np.logspace(low, high, (high - low) * _PER_DECADE + 1)
    extra = [SMALLEST_FP16] + ([] if filter_eps is None else [filter_eps])
    return tuple(sorted({0.0, _TOP, *steps.tolist(), *extra}))


def gradient_histograms(
    step: int,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weight_grad: Tensor | None,
    *,
    bias: Tensor | None = None,
    filter_eps: float | None = None,
) -> list[HistogramRecord]:
    """Distributions of absolute gradients at the final layer.

    Parameters
    ----------
    step : int
        Number of the optimizer step.
    hidden : Tensor, shape (T, d)
    weight : Tensor, shape (V, d)
        Item vectors.
    targets : Tensor, shape (T,), int64
    weight_grad : Tensor, shape (V, d), optional
        Gradient of the mean loss in the item vectors.
    bias : Tensor, shape (V,), optional
    filter_eps : float, optional
        An edge of the histograms.

    Returns
    -------
    list of HistogramRecord
        `logit_gradient`: softmax minus target of a token's full cross-entropy, which is what a
        filter compares with its eps, over at most 256 tokens spread evenly over the batch;
        `item_gradient`: the entries of `weight_grad`.
    """
    edges = histogram_edges(filter_eps)
    chosen = torch.linspace(0, len(targets) - 1, min(_TOKENS, len(targets))).round().long()
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    with torch.no_grad():
        for token in torch.split(chosen.to(hidden.device), 16):
            logits = hidden[token].float() @ weight.T
            if bias is not None:
                logits += bias
            gradient = logits.softmax(dim=1)
            gradient[torch.arange(len(token), device=gradient.device), targets[token]] -= 1.0
            counts += count_by_size(gradient, edges)
        found = [HistogramRecord(step, "logit_gradient", edges, tuple(counts.tolist()))]
        if weight_grad is not None:
            sizes = tuple(count_by_size(weight_grad, edges).tolist())
            found.append(HistogramRecord(step, "item_gradient", edges, sizes))
    return found


def count_by_size(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Absolute values per bin [edge, next edge), shape (B,), int64, on the CPU.

    What is not below the last edge, inf and NaN counts in the last bin.
    """
    bounds = torch.tensor(edges, dtype=torch.float64)
    # the smallest float32 at or above each edge separates float32 values as the edge does
    rounded = bounds.float()
    low = rounded.double() < bounds
    rounded[low] = torch.nextafter(rounded[low], torch.tensor(math.inf))
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    for part in torch.split(values.detach().float().flatten(), 2**22):
        place = torch.bucketize(part.abs(), rounded.to(part.device)[1:-1], right=True)
        counts += torch.bincount(place, minlength=len(counts)).cpu()
    return counts
