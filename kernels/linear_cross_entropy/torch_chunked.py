"""The full softmax in torch, tile by tile over the vocabulary: any device, no Triton.

What `torch_fused` cannot take comes here: forward passes alone, a gradient per token, caps.

The forward pass merges log-sum-exps of tiles; the backward pass computes each tile of logits
again, adds to dE, and writes each slice of dC once. The extra memory is one tile. On a CPU a tile
stays in its cache, and logits that norms prove to be small are exponentiated without a maximum:
what is left is four matrix products and two exponentials per logit.
"""

import math

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import (
    FILTER_STREAM,
    MAX_PLAIN_LOGIT,
    UNBIASED_FILTER,
    GradientFilter,
    LogitOptions,
    accumulation_dtype,
    largest_logit,
    uniforms,
)
from kernels.philox import philox4x32

CPU_TILE = (1024, 256)
"""Tokens and items per tile of a single thread, 1 MiB in float32."""
CPU_THREADS_TILE = (4096, 512)
"""The same of several threads, which split the tokens and meet at the end of each operation."""
LARGE_TILE = 4096
"""Tokens and items per tile elsewhere."""


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
    plain = _are_small(e, weight, bias, options)
    lse = torch.full((num_tokens,), 0.0 if plain else -torch.inf, dtype=accum, device=e.device)
    mean = torch.zeros(num_tokens, dtype=accum, device=e.device)
    tile = _Tile(e)
    drawn, unit = _in_fast_units(options)
    for items in _slices(num_items, tile.num_items):
        chunk = weight[items].to(accum)
        chunk_bias = None if bias is None else bias[items].to(accum)
        for tokens in _slices(num_tokens, tile.num_tokens):
            logits = tile.logits(e[tokens].to(accum), chunk, chunk_bias, drawn)
            if with_mean:
                mean[tokens] += logits.sum(1)
            if plain:
                lse[tokens] += _exp(logits, unit).sum(1)
            else:
                lse[tokens] = torch.logaddexp(lse[tokens], _log_sum_exp(logits, unit))
    if plain:
        lse.log_()
    return lse, positive_logits(e, weight, bias, target, options), mean * (unit / max(num_items, 1))


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
    plain = not grad_filter.mode and grad_mean is None and options.softcap is None
    plain = plain and (accum_dtype == accum or accum == torch.float64)
    if plain and _are_small(e, weight, bias, options):
        return _plain_backward(e, weight, bias, target, lse, grad_lse, grad_positive, options)
    num_tokens, num_items = len(e), len(weight)
    tile = _Tile(e)
    drawn, unit = _in_fast_units(options)
    grad_e = torch.zeros(e.shape, dtype=accum, device=e.device)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    for items in _slices(num_items, tile.num_items):
        chunk = weight[items].to(accum)
        chunk_bias = None if bias is None else bias[items].to(accum)
        grad_chunk = torch.zeros_like(chunk, dtype=accum_dtype if accum != torch.float64 else accum)
        grad_chunk_bias = torch.zeros(len(chunk), dtype=accum, device=e.device)
        for tokens in _slices(num_tokens, tile.num_tokens):
            rows = e[tokens].to(accum)
            logits = tile.logits(rows, chunk, chunk_bias, drawn)
            slope = options.slope(logits) if options.softcap is not None else options.scale
            grad = _exp(logits.sub_(lse[tokens, None] / unit), unit)
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
                grad_chunk += (rows.T @ grad).T
            if bias is not None:
                grad_chunk_bias += grad.sum(0)
        grad_weight[items] = grad_chunk
        if grad_bias is not None:
            grad_bias[items] = grad_chunk_bias.to(grad_bias.dtype)
    return grad_e.to(e.dtype), grad_weight, grad_bias


def _plain_backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    grad_positive: Tensor,
    options: LogitOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`backward` where logits are small and linear in e: all that varies by row is a factor."""
    accum = accumulation_dtype(e.dtype)
    tile = _Tile(e)
    grad_e = torch.zeros(e.shape, dtype=accum)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.empty_like(bias)
    drawn, unit = _in_fast_units(options)
    factor = grad_lse * torch.exp(-lse) * options.scale
    at_target = torch.where(target >= 0, grad_positive * options.scale, 0.0)
    order = torch.argsort(target)
    chunks = _slices(len(weight), tile.num_items)
    edges = torch.tensor([0] + [items.stop for items in chunks])
    ends = torch.searchsorted(target[order], edges).tolist()
    for number, items in enumerate(chunks):
        chunk = weight[items].to(accum)
        chunk_bias = None if bias is None else bias[items].to(accum)
        turned = torch.zeros_like(chunk.T, memory_format=torch.contiguous_format)
        grad_chunk_bias = torch.zeros(len(chunk), dtype=accum)
        for tokens in _slices(len(e), tile.num_tokens):
            rows = e[tokens].to(accum)
            unscaled = _exp(tile.logits(rows, chunk, chunk_bias, drawn), unit)
            grad_e[tokens].addmm_(unscaled, chunk)
            # A quarter faster than the product of the transposed tile.
            turned.addmm_((rows * factor[tokens, None]).T, unscaled)
            if bias is not None:
                grad_chunk_bias.addmv_(unscaled.T, factor[tokens])
        hits = order[ends[number] : ends[number + 1]]
        column = target[hits] - items.start
        added = at_target[hits]
        grad_chunk = turned.T.index_add(0, column, added[:, None] * e[hits].to(accum))
        grad_weight[items] = grad_chunk
        if grad_bias is not None:
            grad_bias[items] = grad_chunk_bias.index_add_(0, column, added).to(grad_bias.dtype)
    for tokens in _slices(len(e), LARGE_TILE):
        grad_e[tokens] *= factor[tokens, None]
        hit = weight[target[tokens].clamp(min=0)].to(accum)
        grad_e[tokens].addcmul_(at_target[tokens, None], hit)
    return grad_e.to(e.dtype), grad_weight, grad_bias


def positive_logits(
    e: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LogitOptions
) -> Tensor:
    """Logit of each token's target, shape (N,); of item 0 where a token is ignored."""
    accum = accumulation_dtype(e.dtype)
    safe = target.clamp(min=0)
    result = torch.empty(len(e), dtype=accum, device=e.device)
    for tokens in _slices(len(e), LARGE_TILE):
        items = safe[tokens]
        dots = (e[tokens].to(accum) * weight[items].to(accum)).sum(1)
        if bias is not None:
            dots += bias[items].to(accum)
        result[tokens] = options.apply(dots)
    return result


class _Tile:
    """Where one tile of logits after another is computed."""

    def __init__(self, e: Tensor) -> None:
        self.num_tokens = self.num_items = LARGE_TILE
        if e.device.type == "cpu":
            one = torch.get_num_threads() == 1
            self.num_tokens, self.num_items = CPU_TILE if one else CPU_THREADS_TILE
        size = min(self.num_tokens, len(e)) * self.num_items
        self.memory = torch.empty(size, dtype=accumulation_dtype(e.dtype), device=e.device)

    def logits(
        self, rows: Tensor, chunk: Tensor, bias: Tensor | None, options: LogitOptions
    ) -> Tensor:
        """Logits of some tokens and items; overwrites those returned before."""
        out = self.memory[: len(rows) * len(chunk)].view(len(rows), len(chunk))
        if options.scale != 1.0 and options.softcap is None:
            rows = rows * options.scale
            bias = None if bias is None else bias * options.scale
            options = LogitOptions()
        if bias is None:
            torch.mm(rows, chunk.T, out=out)
        else:
            torch.addmm(bias, rows, chunk.T, out=out)
        return options.apply(out)


def _are_small(e: Tensor, weight: Tensor, bias: Tensor | None, options: LogitOptions) -> bool:
    """Whether norms bound every logit by MAX_PLAIN_LOGIT; asked of CPUs only, where none waits."""
    if e.device.type != "cpu" or len(e) == 0:
        return False
    return bool(largest_logit(e, weight, bias, options.scale) <= MAX_PLAIN_LOGIT)


def _in_fast_units(options: LogitOptions) -> tuple[LogitOptions, float]:
    """How to compute logits in units whose exponential is cheap, and that unit.

    The exponential to base 2 takes half the time of the natural one. Capped logits stay as they
    are: their unit is 1.
    """
    if options.softcap is not None:
        return options, 1.0
    return LogitOptions(options.scale / math.log(2)), math.log(2)


def _exp(logits: Tensor, unit: float) -> Tensor:
    """Exponentials of logits in that unit; overwrites them."""
    return logits.exp_() if unit == 1.0 else logits.exp2_()


def _log_sum_exp(logits: Tensor, unit: float) -> Tensor:
    """Natural log-sum-exp over the last dimension; overwrites its input."""
    top = logits.amax(1)
    return _exp(logits.sub_(top[:, None]), unit).sum(1).log_().add_(top, alpha=unit)


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
