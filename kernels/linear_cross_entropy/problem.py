"""What a linear layer followed by a loss needs to know, apart from its tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_FILTER, DROP_FILTER, UNBIASED_FILTER = range(3)
FILTER_MODES = {"drop": DROP_FILTER, "unbiased": UNBIASED_FILTER}
FILTER_STREAM = 0x2545F4914F6CDD1D
"""Key offset of the filter's random words, apart from those of the negatives."""
MAX_PLAIN_LOGIT = 40.0
"""Largest magnitude of logits whose exponentials are summed as they are: sums over 2**31 items, and
their inverses, stay far from the ends of float32."""


@dataclass(frozen=True)
class LogitOptions:
    """How a dot product becomes a logit: `cap * tanh(scale * (e . c + b) / cap)`."""

    scale: float = 1.0
    """Multiplies dot product and bias (an inverse temperature)."""
    softcap: float | None = None
    """Bound of the logits' magnitude; None leaves them unbounded."""

    def apply(self, dots: Tensor) -> Tensor:
        """Logits of dot products (with bias); may work in place."""
        if self.scale != 1.0:
            dots = dots.mul_(self.scale)
        if self.softcap is not None:
            dots = dots.div_(self.softcap).tanh_().mul_(self.softcap)
        return dots

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the dot products."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap) ** 2)


@dataclass(frozen=True)
class GradientFilter:
    """Which entries of the softmax take part in the backward pass."""

    mode: int = NO_FILTER
    """NO_FILTER; DROP_FILTER zeroes probabilities below eps; UNBIASED_FILTER keeps them with
    probability p / eps and then counts them as eps."""
    eps: float = 0.0
    """Probability."""

    def apply(self, p: Tensor, uniform: Tensor | None) -> Tensor:
        """Filtered probabilities.

        Parameters
        ----------
        p : Tensor
            Softmax probabilities, before any upstream gradient.
        uniform : Tensor, shape of p, optional
            Uniform numbers in [0, 1), for UNBIASED_FILTER.
        """
        if self.mode == NO_FILTER:
            return p
        if self.mode == DROP_FILTER:
            return p.masked_fill(p < self.eps, 0.0)
        assert uniform is not None
        kept = torch.where(uniform * self.eps < p, self.eps, 0.0).to(p.dtype)
        return torch.where(p < self.eps, kept, p)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest_logit(e: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Bound of every logit's magnitude before a cap, by the longest rows; e must have rows."""
    accum = accumulation_dtype(e.dtype)
    longest = [torch.linalg.vector_norm(t, dim=1, dtype=accum).amax() for t in (e, weight)]
    bound: Tensor = longest[0] * longest[1]
    if bias is not None:
        bound = bound + bias.abs().amax()
    return bound * abs(scale)


def uniforms(words: Tensor) -> Tensor:
    """Numbers in [0, 1) of 24 bits from 32-bit words, float32."""
    return (words >> 8).float() * 2.0**-24
