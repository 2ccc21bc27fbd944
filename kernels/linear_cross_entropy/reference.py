"""What every implementation is held against: dense logits, plain autograd, any dtype."""

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import (
    FILTER_STREAM,
    UNBIASED_FILTER,
    GradientFilter,
    LogitOptions,
    uniforms,
)
from kernels.philox import words
from kernels.sampling import DROP, ZERO, SamplingPlan, draw


def dense_logits(e: Tensor, weight: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    """All logits, shape (N, V)."""
    logits = torch.nn.functional.linear(e, weight, bias) * options.scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits


def full(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LogitOptions,
    grad_filter: GradientFilter,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit and mean logit, shape (N,) each, differentiable."""
    logits = dense_logits(e, weight, bias, options)
    lse = torch.logsumexp(logits, dim=1)
    if grad_filter.mode:
        p = torch.exp(logits - lse[:, None]).detach()
        random = None
        if grad_filter.mode == UNBIASED_FILTER:
            rows = torch.arange(len(e), device=e.device)
            random = uniforms(words(seed + FILTER_STREAM, rows, len(weight))[..., 0])
        lse = _with_gradient(lse, (grad_filter.apply(p, random) * logits).sum(1))
    positive = logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return lse, positive, logits.mean(1)


def sampled(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    *,
    sigmoid: bool,
) -> tuple[Tensor, Tensor]:
    """Sum over the negatives (log-sum-exp, or softplus) and target logit, shape (N,) each."""
    logits = dense_logits(e, weight, bias, options)
    rows = torch.arange(len(e), device=e.device)
    sets = rows // plan.share
    ids, log_count = draw(plan, sets, target if plan.share == 1 else None)
    chosen = logits.gather(1, ids)
    hit = ids == target[:, None]
    positive = logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
    if sigmoid:
        value = torch.nn.functional.softplus(chosen)
        return (value.masked_fill(hit, 0.0) if plan.hits == DROP else value).sum(1), positive

    if plan.hits == ZERO:
        chosen = torch.where(hit, 0.0, chosen)
    value = chosen + plan.base_shift
    if log_count is not None:
        value = value - log_count.to(value.dtype)
    if plan.conditional:
        value = value - torch.log((~hit).sum(1).clamp(min=1).to(value.dtype))[:, None]
        if plan.log_rest is not None:
            value = value + plan.log_rest[:, None].to(value.dtype)
    if plan.hits == DROP:
        value = value.masked_fill(hit, -torch.inf)
    none_left = torch.isinf(value).all(1)
    negative = torch.logsumexp(torch.where(none_left[:, None], 0.0, value), dim=1)
    negative = torch.where(none_left, -torch.inf, negative)
    if grad_filter.mode:
        total = torch.logaddexp(negative, positive).detach()
        p = torch.exp(value.detach() - total[:, None])
        random = None
        if grad_filter.mode == UNBIASED_FILTER:
            random = uniforms(words(plan.seed + FILTER_STREAM, rows, plan.num)[..., 0])
        share = torch.exp(negative.detach() - total).clamp(min=1e-30)
        kept = grad_filter.apply(p, random) / share[:, None]
        finite = torch.where(torch.isinf(value), 0.0, value)
        negative = _with_gradient(negative, (kept * finite).sum(1))
    return negative, positive


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value.detach() + surrogate - surrogate.detach()
