"""Scalable cross-entropy (SCE): softmax over the hardest items of random buckets.

Bucket centers choose, by inner product, the tokens and the items of each bucket; a token's loss is
the largest of its buckets'. Neither the logits of the buckets nor the scores that choose them are
kept, and gradients reach the item embeddings.

References
----------
.. [1] Mezentsev et al., "Scalable Cross-Entropy Loss for Sequential Recommendations with Large Item
   Catalogs", RecSys 2024, arXiv 2409.18721.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from kernels.linear_cross_entropy import api, checks, ops, torch_sampled
from kernels.linear_cross_entropy.problem import (
    GradientFilter,
    LogitOptions,
    accumulation_dtype,
)
from kernels.sampling import DROP, IDS, SamplingPlan

SCORES_PER_CHUNK = 2**24
"""Most scores held at once while buckets are filled."""


def scalable_cross_entropy(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 1.0,
    bucket_size_x: int | None = None,
    bucket_size_y: int = 256,
    mix: bool = True,
    seed: int | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: api.Reduction = "mean",
    deterministic: bool | None = None,
    impl: api.Impl = "auto",
    validate: bool = False,
) -> Tensor:
    r"""SCE of `e @ weight.T` [1]_.

    :math:`n_b = \alpha\sqrt{\beta N}` buckets of :math:`b_x = \alpha\sqrt{N/\beta}` tokens and
    :math:`b_y` items each, for N tokens: the buckets hold each token :math:`\alpha^2` times on
    average. Tokens in no bucket have no loss, and `mean` is over the others.

    Parameters
    ----------
    e, weight, target, ignore_index, sample_weight, num_items, reduction, deterministic, impl
        As in `linear_cross_entropy`; so is `validate`.
    alpha : float
        Square root of the buckets' total capacity for tokens over N; the authors' grid has 2.
    beta : float
        Number of buckets over tokens per bucket; the authors' grid has 1.
    bucket_size_x : int, optional
        Tokens per bucket, in place of what alpha and beta say.
    bucket_size_y : int
        Items per bucket.
    mix : bool
        Centers are random mixtures of the hidden states, which keeps buckets from overlapping;
        otherwise they are Gaussian vectors.
    seed : int, optional
        Of the centers; None takes torch's generator.

    Returns
    -------
    Tensor, shape () or (N,), float32

    Raises
    ------
    ValueError, TypeError
        As `linear_cross_entropy`; also an alpha, beta or bucket size out of range.

    Examples
    --------
    >>> e, weight = torch.randn(64, 8), torch.randn(500, 8)
    >>> scalable_cross_entropy(e, weight, torch.randint(500, (64,)), bucket_size_y=32).shape
    torch.Size([])
    """
    e, weight, _ = checks.autocast(e, weight, None)
    target = checks.check_inputs(e, weight, None, target, ignore_index, validate)
    checks.check_reduction(reduction, sample_weight, num_items, target)
    num_buckets, size_x = bucket_shape(len(e), alpha, beta, bucket_size_x)
    if bucket_size_y < 1:
        raise ValueError(f"bucket_size_y={bucket_size_y} must be 1 or more")
    size_y = min(bucket_size_y, len(weight))
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    chosen = api._choose(e, weight, impl)
    if len(e) == 0:
        return api._reduce(e.float().sum(1), target >= 0, sample_weight, num_items, reduction)
    with torch.no_grad():
        centers = _centers(e, target >= 0, num_buckets, mix, seed)
        members = _top(centers, e, size_x, target >= 0)
        items = _top(centers, weight, size_y, None)
    if chosen in ("dense", "reference"):
        loss = _dense_loss(*api._upcast(e, weight, None, chosen)[:2], target, members, items)
    else:
        loss, _ = bucket_loss(e, weight, target, members, items, deterministic, chosen)
    covered = torch.zeros(len(e), dtype=torch.bool, device=e.device)
    covered[members.flatten()] = True
    return api._reduce(loss, covered & (target >= 0), sample_weight, num_items, reduction)


def bucket_shape(
    num_tokens: int, alpha: float, beta: float, bucket_size_x: int | None = None
) -> tuple[int, int]:
    """Number of buckets and tokens per bucket, each at least 1 and at most the tokens there are."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be a finite number above 0")
    if bucket_size_x is not None and bucket_size_x < 1:
        raise ValueError(f"bucket_size_x={bucket_size_x} must be 1 or more")
    num_buckets = max(1, int(alpha * math.sqrt(beta * num_tokens)))
    size_x = bucket_size_x or max(1, int(alpha * math.sqrt(num_tokens / beta)))
    return num_buckets, min(size_x, max(1, num_tokens))


@torch.library.custom_op("srsweep::bucket_loss", mutates_args=())
def bucket_loss(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    members: Tensor,
    items: Tensor,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Largest loss of each token over its buckets, and the row (bucket, slot) it comes from.

    Parameters
    ----------
    members, items : Tensor, shape (n_b, b_x) and (n_b, b_y), int64
        Tokens and items of each bucket.

    Returns
    -------
    loss : Tensor, shape (N,)
        0 where a token is in no bucket.
    winner : Tensor, shape (N,), int64
        The first of equal rows.
    """
    return ops.triton_or_torch(
        impl,
        lambda: _bucket_loss(e, weight, target, members, items, ops.triton_module("sampled")),
        lambda: _bucket_loss(e, weight, target, members, items, torch_sampled),
    )


def _bucket_loss(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    members: Tensor,
    items: Tensor,
    module: ModuleType,
) -> tuple[Tensor, Tensor]:
    accum = accumulation_dtype(e.dtype)
    row_loss = torch.empty(members.numel(), dtype=accum, device=e.device)
    for rows, tokens, plan in _chunks(members, items, len(e), len(weight)):
        negative, positive, _ = module.forward(
            e[tokens], weight, None, target[tokens], plan, LogitOptions(), sigmoid=False
        )
        row_loss[rows] = torch.logaddexp(negative, positive) - positive
    token = members.flatten()
    loss = torch.full((len(e),), -torch.inf, dtype=accum, device=e.device)
    loss.scatter_reduce_(0, token, row_loss, "amax")
    number = torch.arange(len(token), device=e.device)
    number = torch.where(row_loss == loss[token], number, len(token))
    winner = torch.full((len(e),), len(token), dtype=torch.int64, device=e.device)
    winner.scatter_reduce_(0, token, number, "amin")
    return torch.where(torch.isinf(loss), 0.0, loss), winner


@torch.library.custom_op("srsweep::bucket_loss_backward", mutates_args=())
def bucket_loss_backward(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    members: Tensor,
    items: Tensor,
    winner: Tensor,
    grad_loss: Tensor,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of e and weight; only the bucket that gave a token its loss has one."""
    arguments = (e, weight, target, members, items, winner, grad_loss, deterministic)
    return ops.triton_or_torch(
        impl,
        lambda: _bucket_loss_backward(*arguments, ops.triton_module("sampled")),
        lambda: _bucket_loss_backward(*arguments, torch_sampled),
    )


def _bucket_loss_backward(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    members: Tensor,
    items: Tensor,
    winner: Tensor,
    grad_loss: Tensor,
    deterministic: bool,
    module: ModuleType,
) -> tuple[Tensor, Tensor]:
    accum = accumulation_dtype(e.dtype)
    grad_e = torch.zeros(e.shape, dtype=accum, device=e.device)
    grad_weight = torch.zeros(weight.shape, dtype=accum, device=e.device)
    for rows, tokens, plan in _chunks(members, items, len(e), len(weight)):
        e_rows, target_rows = e[tokens], target[tokens]
        negative, positive, shift = module.forward(
            e_rows, weight, None, target_rows, plan, LogitOptions(), sigmoid=False
        )
        number = torch.arange(rows.start, rows.stop, device=e.device)
        grad = torch.where(winner[tokens] == number, grad_loss[tokens], 0.0)
        lse = torch.logaddexp(negative, positive)
        grad_rows = module.accumulate_backward(
            e_rows, weight, None, target_rows, negative, positive, shift,
            grad * torch.exp(negative - lse), grad * torch.expm1(positive - lse), plan,
            LogitOptions(), GradientFilter(), deterministic, grad_weight, None, sigmoid=False,
        )  # fmt: skip
        if deterministic and e.is_cuda:
            grad_e.index_put_((tokens,), grad_rows.to(accum), accumulate=True)
        else:
            grad_e.index_add_(0, tokens, grad_rows.to(accum))
    return grad_e.to(e.dtype), grad_weight.to(weight.dtype)


@bucket_loss.register_fake
def _bucket_loss_fake(e: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    loss = e.new_empty(e.shape[0], dtype=accumulation_dtype(e.dtype))
    return loss, e.new_empty(e.shape[0], dtype=torch.int64)


@bucket_loss_backward.register_fake
def _bucket_loss_backward_fake(e: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    keep = torch.contiguous_format
    return torch.empty_like(e, memory_format=keep), torch.empty_like(weight, memory_format=keep)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.deterministic, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_loss, _grad_winner):  # type: ignore[no-untyped-def]
    grads = bucket_loss_backward(*ctx.saved_tensors, grad_loss, ctx.deterministic, ctx.impl)
    return (*grads, *(None,) * 5)


bucket_loss.register_autograd(_backward, setup_context=_setup)


def _chunks(members: Tensor, items: Tensor, num_tokens: int, num_items: int):  # type: ignore[no-untyped-def]
    """Some buckets at a time: their rows, tokens and sampling plan; about N / 2 rows each."""
    num_buckets, size_x = members.shape
    step = max(1, num_tokens // (2 * size_x))
    for start in range(0, num_buckets, step):
        stop = min(start + step, num_buckets)
        plan = SamplingPlan(
            kind=IDS,
            num=items.shape[1],
            share=size_x,
            num_items=num_items,
            skip_positive=False,
            stratified=False,
            hits=DROP,
            conditional=False,
            corrected=False,
            base_shift=0.0,
            seed=torch.zeros((), dtype=torch.int64, device=members.device),
            source=items[start:stop],
        )
        yield slice(start * size_x, stop * size_x), members[start:stop].flatten(), plan


def _dense_loss(
    e: Tensor, weight: Tensor, target: Tensor, members: Tensor, items: Tensor
) -> Tensor:
    """`bucket_loss` with every logit in memory and plain autograd."""
    logits = e[members] @ weight[items].transpose(1, 2)
    label = target.clamp(min=0)[members]
    logits = logits.masked_fill(label[..., None] == items[:, None], -torch.inf)
    positive = (e[members] * weight[label]).sum(-1, keepdim=True)
    losses = torch.logsumexp(torch.cat([logits, positive], dim=-1), dim=-1) - positive[..., 0]
    empty = torch.full((len(e),), -torch.inf, dtype=losses.dtype, device=e.device)
    loss = empty.scatter_reduce(0, members.flatten(), losses.flatten(), "amax")
    return torch.where(torch.isinf(loss), 0.0, loss)


def _centers(e: Tensor, valid: Tensor, num_buckets: int, mix: bool, seed: int | None) -> Tensor:
    """Bucket centers, shape (n_b, D), in e's dtype; Gaussian with standard deviation D**-1/4."""
    generator = None
    if seed is not None:
        generator = torch.Generator(e.device).manual_seed(seed)
    width: int = e.shape[1]
    scale = float(width**-0.25)
    if not mix:
        shape = (num_buckets, width)
        return (torch.randn(shape, generator=generator, device=e.device) * scale).to(e.dtype)
    centers = torch.zeros(num_buckets, width, device=e.device)
    step = max(1, SCORES_PER_CHUNK // num_buckets)
    for start in range(0, len(e), step):
        rows = torch.where(valid[start : start + step, None], e[start : start + step].float(), 0.0)
        omega = torch.randn(num_buckets, len(rows), generator=generator, device=e.device)
        centers.addmm_(omega, rows, alpha=scale)
    return centers.to(e.dtype)


def _top(centers: Tensor, rows: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """Rows of largest inner product with each center, shape (n_b, count), chunk by chunk."""
    step = max(4 * count, SCORES_PER_CHUNK // len(centers))
    index: Tensor
    best = torch.empty(len(centers), 0, dtype=rows.dtype, device=rows.device)
    index = torch.empty(len(centers), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), step):
        scores = centers @ rows[start : start + step].T
        if valid is not None:
            scores.masked_fill_(~valid[start : start + step], -torch.inf)
        value, place = torch.topk(scores, min(count, scores.shape[1]), dim=1)
        best = torch.cat([best, value], dim=1)
        index = torch.cat([index, place + start], dim=1)
        if best.shape[1] > count:
            best, place = torch.topk(best, count, dim=1)
            index = index.gather(1, place)
    return index
