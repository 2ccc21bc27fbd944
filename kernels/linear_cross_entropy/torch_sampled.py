"""The sampled losses in torch, block by block of tokens: any device, no Triton.

Draws the negatives that the Triton kernels draw, and draws them again in the backward pass.
"""

from collections.abc import Iterator

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
from kernels.linear_cross_entropy.torch_chunked import positive_logits
from kernels.philox import words
from kernels.sampling import DROP, ZERO, SamplingPlan, draw

ELEMENTS_PER_BLOCK = 2**22
"""Most elements of a block's gathered embeddings and of its logits."""


def forward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    *,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over each token's negatives, its target logit, and the shift applied.

    Parameters
    ----------
    e, weight, bias, target, options
        As in `torch_chunked.forward`.
    plan : SamplingPlan
        The negatives.
    sigmoid : bool
        False: the sum is a log-sum-exp of corrected logits. True: it is the sum of softplus.

    Returns
    -------
    negative, positive, shift : Tensor, shape (N,)
        In the accumulation dtype; `negative` includes `shift`, which has no gradient.
    """
    accum = accumulation_dtype(e.dtype)
    negative = torch.empty(len(e), dtype=accum, device=e.device)
    shift = torch.full((len(e),), plan.base_shift, dtype=accum, device=e.device)
    for block in _blocks(e, weight, bias, target, plan, options):
        if sigmoid:
            value = torch.nn.functional.softplus(block.logits)
            value.masked_fill_(block.hit, 0.0)
            negative[block.tokens] = value.sum(2).flatten()[: block.size]
            continue
        if plan.conditional:
            shift[block.tokens] += _conditional_shift(block, plan, accum)
        value = block.log_weights(plan)
        total = torch.logsumexp(value, dim=2).flatten()[: block.size]
        negative[block.tokens] = total + shift[block.tokens]
    return negative, positive_logits(e, weight, bias, target, options), shift


def backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    negative: Tensor,
    positive: Tensor,
    shift: Tensor,
    grad_negative: Tensor,
    grad_positive: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    deterministic: bool,
    *,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`'s first two outputs with respect to e, weight and bias.

    Parameters
    ----------
    negative, positive, shift : Tensor, shape (N,)
        What `forward` returned.
    grad_negative, grad_positive : Tensor, shape (N,)
        Upstream gradients.
    deterministic : bool
        Whether equal inputs must give equal bits on a GPU (a CPU always does).

    Returns
    -------
    grad_e, grad_weight, grad_bias
        In the dtypes of e, weight and bias.
    """
    accum = accumulation_dtype(e.dtype)
    grad_weight = torch.zeros(weight.shape, dtype=accum, device=e.device)
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=accum, device=e.device)
    grad_e = accumulate_backward(
        e, weight, bias, target, negative, positive, shift, grad_negative, grad_positive, plan,
        options, grad_filter, deterministic, grad_weight, grad_bias, sigmoid=sigmoid,
    )  # fmt: skip
    return (
        grad_e,
        grad_weight.to(weight.dtype),
        None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
    )


def accumulate_backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    negative: Tensor,
    positive: Tensor,
    shift: Tensor,
    grad_negative: Tensor,
    grad_positive: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    deterministic: bool,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    *,
    sigmoid: bool,
) -> Tensor:
    """`backward` that adds to `grad_weight` and `grad_bias` and returns the gradient of e."""
    accum = accumulation_dtype(e.dtype)
    grad_e = torch.empty(e.shape, dtype=accum, device=e.device)
    for block in _blocks(e, weight, bias, target, plan, options):
        slope = options.slope(block.logits)
        if sigmoid:
            grad = torch.sigmoid(block.logits).masked_fill_(block.hit, 0.0)
        else:
            base = negative[block.tokens] - shift[block.tokens]
            # A token whose negatives were all hits has base = -inf, and no gradient.
            base = base.masked_fill(base == -torch.inf, 0.0)
            grad = torch.exp(block.log_weights(plan) - block.pad(base)[..., None])
            if plan.hits == ZERO:
                grad.masked_fill_(block.hit, 0.0)
            if grad_filter.mode:
                share = torch.exp(
                    negative[block.tokens]
                    - torch.logaddexp(negative[block.tokens], positive[block.tokens])
                )
                share = block.pad(share)[..., None].clamp_(min=1e-30)
                words_of_block = None
                if grad_filter.mode == UNBIASED_FILTER:
                    words_of_block = _filter_uniforms(plan, block)
                grad = grad_filter.apply(grad * share, words_of_block) / share
        grad *= block.pad(grad_negative[block.tokens])[..., None]
        grad *= slope
        grad_e[block.tokens] = (grad @ block.items).flatten(0, 1)[: block.size]
        rows = grad.transpose(1, 2) @ block.rows
        _add_rows(grad_weight, block.ids.flatten(), rows.flatten(0, 1), deterministic)
        if grad_bias is not None:
            _add_rows(grad_bias, block.ids.flatten(), grad.sum(1).flatten(), deterministic)
    _add_positive(
        e, weight, target, positive, grad_positive, options,
        (grad_e, grad_weight, grad_bias), deterministic,
    )  # fmt: skip
    return grad_e.to(e.dtype)


class _Block:
    """Some sets of negatives with their tokens: G sets of R tokens, the last set padded."""

    def __init__(self, tokens: slice, ids: Tensor, log_count: Tensor | None, share: int) -> None:
        self.tokens = tokens
        self.ids = ids  # (G, ns)
        self.log_count = log_count  # (G, ns)
        self.size = tokens.stop - tokens.start
        self.per_set = self.size if len(ids) == 1 else share
        self.items = self.rows = self.logits = self.hit = torch.empty(0)

    def pad(self, values: Tensor) -> Tensor:
        """Values per token, (size, ...), as (G, R, ...)."""
        missing = len(self.ids) * self.per_set - self.size
        if missing:
            values = torch.cat([values, values.new_zeros(missing, *values.shape[1:])])
        return values.view(len(self.ids), self.per_set, *values.shape[1:])

    def log_weights(self, plan: SamplingPlan) -> Tensor:
        """Corrected logits, (G, R, ns), without the shift."""
        value = self.logits
        if plan.hits == ZERO:
            value = value.masked_fill(self.hit, 0.0)
        if self.log_count is not None:
            value = value - self.log_count[:, None]
        if plan.hits == DROP:
            value = value.masked_fill(self.hit, -torch.inf)
        return value


def _blocks(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
) -> Iterator[_Block]:
    accum = accumulation_dtype(e.dtype)
    for tokens, first_set, num_sets in _partition(len(e), plan, e.shape[1]):
        sets = torch.arange(first_set, first_set + num_sets, device=e.device)
        ids, log_count = draw(plan, sets, target[tokens] if plan.share == 1 else None)
        block = _Block(tokens, ids, None if log_count is None else log_count.to(accum), plan.share)
        block.items = weight[ids].to(accum)
        block.rows = block.pad(e[tokens].to(accum))
        dots = block.rows @ block.items.transpose(1, 2)
        if bias is not None:
            dots += bias[ids].to(accum)[:, None]
        block.logits = options.apply(dots)
        if plan.hits in (DROP, ZERO):
            block.hit = ids[:, None] == block.pad(target[tokens])[..., None]
        else:
            block.hit = torch.zeros((), dtype=torch.bool, device=e.device)
        yield block


def _partition(num_tokens: int, plan: SamplingPlan, width: int) -> Iterator[tuple[slice, int, int]]:
    """Token ranges that hold whole sets, or part of one set, of bounded size."""
    per_set = plan.num * max(width, min(plan.share, num_tokens))
    sets_per_block = max(1, ELEMENTS_PER_BLOCK // per_set)
    if plan.num * plan.share > ELEMENTS_PER_BLOCK:
        part = max(1, ELEMENTS_PER_BLOCK // plan.num)
        for start in range(0, num_tokens, plan.share):
            stop = min(start + plan.share, num_tokens)
            for begin in range(start, stop, part):
                yield slice(begin, min(begin + part, stop)), start // plan.share, 1
        return
    step = sets_per_block * plan.share
    for start in range(0, num_tokens, step):
        stop = min(start + step, num_tokens)
        yield slice(start, stop), start // plan.share, -(-(stop - start) // plan.share)


def _conditional_shift(block: _Block, plan: SamplingPlan, accum: torch.dtype) -> Tensor:
    """log(1 - q(target)) - log(number of negatives that did not hit), per token."""
    kept = (plan.num - block.hit.sum(2)).flatten()[: block.size].to(accum)
    shift = -torch.log(kept.clamp(min=1))
    return shift if plan.log_rest is None else shift + plan.log_rest[block.tokens].to(accum)


def _filter_uniforms(plan: SamplingPlan, block: _Block) -> Tensor:
    rows = torch.arange(block.tokens.start, block.tokens.stop, device=block.ids.device)
    word = words(plan.seed + FILTER_STREAM, rows, plan.num)[..., 0]
    return block.pad(uniforms(word))


def _add_positive(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    positive: Tensor,
    grad_positive: Tensor,
    options: LogitOptions,
    grads: tuple[Tensor, Tensor, Tensor | None],
    deterministic: bool,
) -> None:
    """Add the gradient of each token's target logit to dE, dC and db."""
    grad_e, grad_weight, grad_bias = grads
    accum = grad_e.dtype
    grad = grad_positive * options.slope(positive)
    grad = torch.where(target >= 0, grad, 0.0)
    safe = target.clamp(min=0)
    step = max(1, ELEMENTS_PER_BLOCK // max(1, e.shape[1]))
    for start in range(0, len(e), step):
        part = slice(start, start + step)
        scale = grad[part, None]
        grad_e[part] += scale * weight[safe[part]].to(accum)
        _add_rows(grad_weight, safe[part], scale * e[part].to(accum), deterministic)
    if grad_bias is not None:
        _add_rows(grad_bias, safe, grad, deterministic)


def _add_rows(into: Tensor, index: Tensor, rows: Tensor, deterministic: bool) -> None:
    if deterministic and into.is_cuda:
        into.index_put_((index,), rows, accumulate=True)  # sorts, where index_add_ races
    else:
        into.index_add_(0, index, rows)
