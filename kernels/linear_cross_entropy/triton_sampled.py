"""The sampled losses by Triton: per-token kernels, or tiles where tokens share their negatives."""

import math

import torch
from torch import Tensor

from kernels.linear_cross_entropy import triton_tile, triton_token
from kernels.linear_cross_entropy.problem import FILTER_STREAM, GradientFilter, LogitOptions
from kernels.linear_cross_entropy.triton_full import (
    _blocks,
    _merged,
    _options,
    _partial,
    _split,
    positive_logits,
)
from kernels.linear_cross_entropy.triton_launch import (
    FIXED_POINT,
    GRADIENT_SCALE,
    ScaledGradients,
    num_splits,
    row_major,
    tile_config,
    token_config,
    upcasts,
)
from kernels.sampling import LOG_UNIFORM, SamplingPlan, log_range

MIN_TILE_SHARE = 16
"""Fewest tokens per set for which a matrix product beats a walk through the negatives."""
MAX_TOKEN_WIDTH = 1024
"""Widest embedding that a per-token program keeps in registers."""


def obstacle(plan: SamplingPlan, width: int) -> str:
    """Why these kernels cannot carry out a plan; empty when they can."""
    if plan.skip_positive and width > MAX_TOKEN_WIDTH:
        return f"negatives per token with D={width} above {MAX_TOKEN_WIDTH} have no Triton kernel"
    return ""


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
    """As `torch_sampled.forward`."""
    e, weight, target = row_major(e), row_major(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    shift = torch.full((len(e),), plan.base_shift, dtype=torch.float32, device=e.device)
    if len(e) == 0:
        return torch.empty_like(shift), torch.empty_like(shift), shift
    launch = _forward_tokens if _per_token(plan, e.shape[1]) else _forward_tiles
    total, positive, hits = launch(e, weight, bias, target, plan, options, sigmoid)
    if sigmoid:
        return total, positive, shift
    if plan.conditional:
        shift = shift - torch.log((plan.num - hits).clamp(min=1))
        if plan.log_rest is not None:
            shift = shift + plan.log_rest
    return total + shift, positive, shift


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
    """As `torch_sampled.backward`."""
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=e.device)
    grad_bias = None if bias is None else torch.zeros(bias.shape, device=e.device)
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
    """As `torch_sampled.accumulate_backward`."""
    if len(e) == 0:
        return e.clone()
    e, weight, target = row_major(e), row_major(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    per_token = _per_token(plan, e.shape[1])
    factor = 1.0 if per_token else GRADIENT_SCALE
    grads = ScaledGradients.of(grad_negative, grad_positive, None, factor)
    # A token whose negatives were all hits has negative = -inf, and no gradient.
    base = torch.where(torch.isinf(negative), math.inf, negative - shift)
    share = torch.exp(negative - torch.logaddexp(negative, positive)).clamp(min=1e-30)
    scale_e = grads.largest * options.scale
    into, into_bias, scale_c = grad_weight, grad_bias, scale_e
    if deterministic:
        into = torch.zeros_like(grad_weight, dtype=torch.int64)
        into_bias = None if grad_bias is None else torch.zeros_like(grad_bias, dtype=torch.int64)
        scale_c = torch.full_like(scale_e, FIXED_POINT / factor * options.scale)
    launch = _backward_tokens if per_token else _backward_tiles
    grad_e = launch(
        e, weight, bias, target, base, share, positive, grads, scale_e, scale_c, into, into_bias,
        plan, options, grad_filter, sigmoid,
    )  # fmt: skip
    if deterministic:
        back = grads.largest * (factor / FIXED_POINT)
        grad_weight += into.float().mul_(back)
        if grad_bias is not None and into_bias is not None:
            grad_bias += into_bias.float().mul_(back)
    return grad_e


def _per_token(plan: SamplingPlan, width: int) -> bool:
    return plan.share < MIN_TILE_SHARE and width <= MAX_TOKEN_WIDTH


def _forward_tokens(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, width = e.shape
    total = torch.empty(num_tokens, dtype=torch.float32, device=e.device)
    positive, hits = torch.empty_like(total), torch.empty_like(total)
    rows, block, warps = token_config(width)
    triton_token.forward_kernel[(-(-num_tokens // rows),)](
        e, weight, bias, target, total, positive, hits, *_draws(plan), num_tokens, plan.num, width,
        plan.share, e.stride(0), weight.stride(0), *_options(options), *_ranges(plan),
        SKIP=plan.skip_positive, SIGMOID=sigmoid, **_flags(plan, bias, options),
        BM=rows, BD=block, UPCAST=upcasts(e.dtype), num_warps=warps,
    )  # fmt: skip
    return total, positive, hits


def _backward_tokens(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    base: Tensor,
    share: Tensor,
    positive: Tensor,
    grads: ScaledGradients,
    scale_e: Tensor,
    scale_c: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    sigmoid: bool,
) -> Tensor:
    num_tokens, width = e.shape
    grad_e = torch.empty(e.shape, dtype=e.dtype, device=e.device)
    rows, block, warps = token_config(width)
    triton_token.backward_kernel[(-(-num_tokens // rows),)](
        e, weight, bias, target, base, grads.base, grads.target, share, positive, scale_e, scale_c,
        grad_e, grad_weight, grad_bias, *_draws(plan), plan.seed + FILTER_STREAM, num_tokens,
        plan.num, width, plan.share, e.stride(0), weight.stride(0), *_options(options),
        grad_filter.eps, *_ranges(plan),
        SKIP=plan.skip_positive, SIGMOID=sigmoid, FILTER=grad_filter.mode,
        **_flags(plan, bias, options),
        BM=rows, BD=block, UPCAST=upcasts(e.dtype), num_warps=warps,
    )  # fmt: skip
    return grad_e


def _forward_tiles(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    sigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, width = e.shape
    config = tile_config("forward", width, e.dtype, plan.share, gathers=True)
    tiles = -(-num_tokens // plan.share) * -(-plan.share // config.rows)
    splits, per_split = _split(tiles, plan.num, config.columns, e.device)
    total = torch.empty(splits, num_tokens, dtype=torch.float32, device=e.device)
    hits = torch.empty_like(total) if plan.conditional else None
    triton_tile.forward_kernel[(tiles, splits)](
        e, weight, bias, target, total, hits, *_draws(plan), num_tokens, plan.num, width,
        plan.share, per_split, e.stride(0), weight.stride(0), *_options(options), *_ranges(plan),
        SAMPLED=True, SIGMOID=sigmoid, EXTRA=2 if plan.conditional else 0,
        **_flags(plan, bias, options), **_blocks(config, e.dtype),
    )  # fmt: skip
    merged = total.sum(0) if sigmoid else torch.logsumexp(total, dim=0)
    counted = total[0] if hits is None else hits.sum(0)
    return merged, positive_logits(e, weight, bias, target, options), counted


def _backward_tiles(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    base: Tensor,
    share: Tensor,
    positive: Tensor,
    grads: ScaledGradients,
    scale_e: Tensor,
    scale_c: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    sigmoid: bool,
) -> Tensor:
    num_tokens, width = e.shape
    sets = -(-num_tokens // plan.share)
    flags = _flags(plan, bias, options) | {
        "SAMPLED": True, "SIGMOID": sigmoid, "HAS_MEAN": False, "FILTER": grad_filter.mode,
    }  # fmt: skip
    before = (e, weight, bias, target, base, grads.base, grads.target, None, share)
    random = (*_draws(plan), plan.seed + FILTER_STREAM)

    config = tile_config("grad_e", width, e.dtype, plan.share, gathers=True)
    tiles = sets * -(-plan.share // config.rows)
    splits, per_split = _split(tiles, plan.num, config.columns, e.device)
    grad_e = _partial(splits, e)
    triton_tile.grad_e_kernel[(tiles, splits, config.num_parts)](
        *before, positive, scale_e, grad_e, *random, num_tokens, plan.num, width, plan.share,
        per_split, e.stride(0), weight.stride(0), *_options(options), grad_filter.eps,
        *_ranges(plan), **flags, **_blocks(config, e.dtype),
    )  # fmt: skip

    config = tile_config("grad_c", width, e.dtype, plan.share, gathers=True)
    tiles = sets * -(-plan.num // config.columns)
    blocks = -(-plan.share // config.rows)
    splits = num_splits(tiles, blocks, e.device)
    per_split = -(-blocks // splits) * config.rows
    triton_tile.grad_c_kernel[(tiles, -(-plan.share // per_split), config.num_parts)](
        *before, scale_c, grad_weight, grad_bias, *random, num_tokens, plan.num, width, plan.share,
        per_split, e.stride(0), weight.stride(0), *_options(options), grad_filter.eps,
        *_ranges(plan), **flags, **_blocks(config, e.dtype),
    )  # fmt: skip
    rows = 32
    triton_token.positive_grad_c_kernel[(-(-num_tokens // rows), config.num_parts)](
        e, target, grads.target, positive, grad_weight, grad_bias, num_tokens, width, e.stride(0),
        options.softcap or 1.0, scale_c, HAS_BIAS=bias is not None,
        SOFTCAP=options.softcap is not None, BM=rows, BD=config.width, UPCAST=upcasts(e.dtype),
    )  # fmt: skip
    return _merged(grad_e, e.dtype)


def _draws(plan: SamplingPlan) -> tuple[Tensor | None, ...]:
    return plan.seed, plan.source, plan.alias, plan.log_q, plan.pool_size


def _ranges(plan: SamplingPlan) -> tuple[int, int, float]:
    if plan.kind == LOG_UNIFORM:
        return plan.num_items, log_range(plan.num_items), 1 / math.log(plan.num_items + 1)
    return plan.range_size, 0, 0.0


def _flags(plan: SamplingPlan, bias: Tensor | None, options: LogitOptions) -> dict[str, object]:
    return {
        "HAS_BIAS": bias is not None, "SOFTCAP": options.softcap is not None, "KIND": plan.kind,
        "STRATIFIED": plan.stratified, "HITS": plan.hits, "CORRECTED": plan.corrected,
    }  # fmt: skip
