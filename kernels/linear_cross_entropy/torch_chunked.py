"""The full softmax in torch, tile by tile over the vocabulary: any device, no Triton.

The forward pass merges log-sum-exps of tiles; the backward pass computes each tile of logits
again, adds to dE, and writes each slice of dC once. The extra memory is one tile.
"""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import (
    FILTER_STREAM,
    UNBIASED_FILTER,
    GradientFilter,
    LogitOptions,
    accumulation_dtype,
    uniforms,
)
from kernels.philox import philox4x32

TOKENS_PER_TILE = 4096
ITEMS_PER_TILE = 4096


def forward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LogitOptions,
    *,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit and mean logit of every token.

    Parameters
    ----------
    e : Tensor, shape (N, D)
        Hidden states.
    weight : Tensor, shape (V, D)
        Item embeddings.
    bias : Tensor, shape (V,), optional
        Added to the dot products.
    target : Tensor, shape (N,), int64
        Items; negative where a token is ignored.
    options : LogitOptions
        Scale and cap.
    with_mean : bool
        Whether the mean logit is wanted (label smoothing); zeros otherwise.

    Returns
    -------
    lse, positive, mean : Tensor, shape (N,)
        In the accumulation dtype.
    """
    accum = accumulation_dtype(e.dtype)
    num_tokens, num_items = len(e), len(weight)
    lse = torch.full((num_tokens,), -torch.inf, dtype=accum, device=e.device)
    mean = torch.zeros(num_tokens, dtype=accum, device=e.device)
    for items in _slices(num_items, ITEMS_PER_TILE):
        chunk = weight[items].to(accum)
        chunk_bias = None if bias is None else bias[items].to(accum)
        for tokens in _slices(num_tokens, TOKENS_PER_TILE):
            logits = _logits(e[tokens].to(accum), chunk, chunk_bias, options)
            if with_mean:
                mean[tokens] += logits.sum(1)
            lse[tokens] = torch.logaddexp(lse[tokens], _log_sum_exp(logits))
    return lse, positive_logits(e, weight, bias, target, options), mean / max(num_items, 1)


def backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    grad_positive: Tensor,
    grad_mean: Tensor | None,
    options: LogitOptions,
    grad_filter: GradientFilter,
    seed: Tensor,
    accum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`'s three outputs with respect to e, weight and bias.

    Parameters
    ----------
    grad_lse, grad_positive, grad_mean : Tensor, shape (N,)
        Upstream gradients.
    grad_filter : GradientFilter
        What of the softmax takes part.
    seed : Tensor, shape (), int64
        Key of the unbiased filter's words.
    accum_dtype : torch.dtype
        dtype in which dC is kept before it is cast to weight's.

    Returns
    -------
    grad_e, grad_weight, grad_bias
        In the dtypes of e, weight and bias.
    """
    accum = accumulation_dtype(e.dtype)
    num_tokens, num_items = len(e), len(weight)
    grad_e = torch.zeros(e.shape, dtype=accum, device=e.device)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    for items in _slices(num_items, ITEMS_PER_TILE):
        chunk = weight[items].to(accum)
        chunk_bias = None if bias is None else bias[items].to(accum)
        grad_chunk = torch.zeros_like(chunk, dtype=accum_dtype if accum != torch.float64 else accum)
        grad_chunk_bias = torch.zeros(len(chunk), dtype=accum, device=e.device)
        for tokens in _slices(num_tokens, TOKENS_PER_TILE):
            rows = e[tokens].to(accum)
            logits = _logits(rows, chunk, chunk_bias, options)
            slope = options.slope(logits) if options.softcap is not None else options.scale
            grad = logits.sub_(lse[tokens, None]).exp_()
            if grad_filter.mode:
                words = None
                if grad_filter.mode == UNBIASED_FILTER:
                    words = _filter_uniforms(seed, tokens, items, num_items, e.device)
                grad = grad_filter.apply(grad, words)
            grad.mul_(grad_lse[tokens, None])
            if grad_mean is not None:
                grad.add_(grad_mean[tokens, None], alpha=1 / num_items)
            column = target[tokens] - items.start
            inside = (column >= 0) & (column < len(chunk)) & (target[tokens] >= 0)
            added = torch.where(inside, grad_positive[tokens], 0.0)
            grad.scatter_add_(1, column.clamp(0, len(chunk) - 1)[:, None], added[:, None])
            if not isinstance(slope, float) or slope != 1.0:
                grad.mul_(slope)
            grad_e[tokens].addmm_(grad, chunk)
            if grad_chunk.dtype == accum:
                grad_chunk.addmm_(grad.T, rows)
            else:
                grad_chunk += grad.T @ rows
            if bias is not None:
                grad_chunk_bias += grad.sum(0)
        grad_weight[items] = grad_chunk
        if grad_bias is not None:
            grad_bias[items] = grad_chunk_bias.to(grad_bias.dtype)
    return grad_e.to(e.dtype), grad_weight, grad_bias


def positive_logits(
    e: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LogitOptions
) -> Tensor:
    """Logit of each token's target, shape (N,); of item 0 where a token is ignored."""
    accum = accumulation_dtype(e.dtype)
    safe = target.clamp(min=0)
    result = torch.empty(len(e), dtype=accum, device=e.device)
    for tokens in _slices(len(e), TOKENS_PER_TILE):
        items = safe[tokens]
        dots = (e[tokens].to(accum) * weight[items].to(accum)).sum(1)
        if bias is not None:
            dots += bias[items].to(accum)
        result[tokens] = options.apply(dots)
    return result


def _logits(rows: Tensor, chunk: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    dots = rows @ chunk.T if bias is None else torch.addmm(bias, rows, chunk.T)
    return options.apply(dots)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension; overwrites its input."""
    top = logits.amax(1)
    return logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _filter_uniforms(
    seed: Tensor, tokens: slice, items: slice, num_items: int, device: torch.device
) -> Tensor:
    """Uniform numbers of a tile; logit (i, j) has word j % 4 of counter i ceil(V / 4) + j // 4."""
    per_row = -(-num_items // 4)
    first, last = items.start // 4, -(-items.stop // 4)
    rows = torch.arange(tokens.start, tokens.stop, device=device)
    counter = rows[:, None] * per_row + torch.arange(first, last, device=device)
    words = torch.stack(philox4x32(seed + FILTER_STREAM, counter), dim=-1).flatten(1)
    return uniforms(words[:, items.start - 4 * first : items.stop - 4 * first])


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
