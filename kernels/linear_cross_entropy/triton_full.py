"""The full softmax by Triton: launches of the tile kernels over the whole catalog."""

import torch
from torch import Tensor

from kernels.linear_cross_entropy import triton_tile, triton_token
from kernels.linear_cross_entropy.problem import FILTER_STREAM, GradientFilter, LogitOptions
from kernels.linear_cross_entropy.triton_launch import (
    GRADIENT_SCALE,
    ScaledGradients,
    TileConfig,
    num_splits,
    precision,
    row_major,
    tile_config,
    upcasts,
)


def forward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LogitOptions,
    *,
    with_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_chunked.forward`."""
    e, weight, target = row_major(e), row_major(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_tokens, width = e.shape
    num_items = len(weight)
    if num_tokens == 0:
        return tuple(e.new_empty(0, dtype=torch.float32) for _ in range(3))  # type: ignore[return-value]
    config = tile_config("forward", width, e.dtype, num_tokens)
    tiles = -(-num_tokens // config.rows)
    splits, per_split = _split(tiles, num_items, config.columns, e.device)
    lse = torch.empty(splits, num_tokens, dtype=torch.float32, device=e.device)
    total = torch.empty_like(lse) if with_mean else None
    triton_tile.forward_kernel[(tiles, splits)](
        e, weight, bias, target, lse, total, _no_seed(e), None, None, None, None,
        num_tokens, num_items, width, num_tokens, per_split, e.stride(0), weight.stride(0),
        *_options(options), 0, 0, 0.0,
        EXTRA=int(with_mean), SIGMOID=False, **_flags(bias, options), **_blocks(config, e.dtype),
    )  # fmt: skip
    mean = lse.new_zeros(num_tokens) if total is None else total.sum(0) / num_items
    merged = lse[0] if splits == 1 else torch.logsumexp(lse, dim=0)
    return merged, positive_logits(e, weight, bias, target, options), mean


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
    """As `torch_chunked.backward`; dC is accumulated in float32 registers whatever accum_dtype."""
    e, weight, target = row_major(e), row_major(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    num_tokens, width = e.shape
    num_items = len(weight)
    if num_tokens == 0:
        return e.clone(), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    if grad_mean is not None:
        grad_mean = grad_mean / num_items
    grads = ScaledGradients.of(grad_lse, grad_positive, grad_mean, GRADIENT_SCALE)
    scale = grads.largest * options.scale
    filter_seed = seed + FILTER_STREAM
    flags = _flags(bias, options) | {
        "SIGMOID": False, "HAS_MEAN": grad_mean is not None, "FILTER": grad_filter.mode,
    }  # fmt: skip
    before = (e, weight, bias, target, lse, grads.base, grads.target, grads.mean, None)
    random = (filter_seed, None, None, None, None, filter_seed)

    config = tile_config("grad_e", width, e.dtype, num_tokens)
    tiles = -(-num_tokens // config.rows)
    splits, per_split = _split(tiles, num_items, config.columns, e.device)
    grad_e = _partial(splits, e)
    triton_tile.grad_e_kernel[(tiles, splits, config.num_parts)](
        *before, None, scale, grad_e, *random, num_tokens, num_items, width, num_tokens, per_split,
        e.stride(0), weight.stride(0), *_options(options), grad_filter.eps, 0, 0, 0.0,
        **flags, **_blocks(config, e.dtype),
    )  # fmt: skip

    config = tile_config("grad_c", width, e.dtype, num_tokens)
    tiles = -(-num_items // config.columns)
    splits, per_split = _split(tiles, num_tokens, config.rows, e.device)
    grad_weight = _partial(splits, weight)
    grad_bias = None
    if bias is not None:
        grad_bias = torch.empty(splits, num_items, dtype=torch.float32, device=e.device)
    triton_tile.grad_c_kernel[(tiles, splits, config.num_parts)](
        *before, scale, grad_weight, grad_bias, *random, num_tokens, num_items, width, num_tokens,
        per_split, e.stride(0), weight.stride(0), *_options(options), grad_filter.eps, 0, 0, 0.0,
        **flags, **_blocks(config, e.dtype),
    )  # fmt: skip
    return (
        _merged(grad_e, e.dtype),
        _merged(grad_weight, weight.dtype),
        None if bias is None or grad_bias is None else _merged(grad_bias, bias.dtype),
    )


def positive_logits(
    e: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LogitOptions
) -> Tensor:
    """Logit of each token's target, shape (N,), float32."""
    num_tokens, width = e.shape
    positive = torch.empty(num_tokens, dtype=torch.float32, device=e.device)
    config = tile_config("forward", width, e.dtype, num_tokens)
    rows = min(config.rows, 32) if config.num_warps > 4 else config.rows
    triton_token.positive_kernel[(-(-num_tokens // rows),)](
        e, weight, bias, target, positive, num_tokens, width, e.stride(0), weight.stride(0),
        *_options(options), HAS_BIAS=bias is not None, SOFTCAP=options.softcap is not None,
        BM=rows, BD=config.width, NUM_D=config.num_parts, UPCAST=upcasts(e.dtype),
    )  # fmt: skip
    return positive


def _split(tiles: int, total: int, block: int, device: torch.device) -> tuple[int, int]:
    """Splits of a reduction over `total`, and elements of each, whole blocks."""
    blocks = -(-total // block)
    splits = num_splits(tiles, blocks, device)
    per_split = -(-blocks // splits) * block
    return -(-total // per_split), per_split


def _partial(splits: int, like: Tensor) -> Tensor:
    """Where splits of a gradient go: one is written in its final dtype."""
    dtype = like.dtype if splits == 1 else torch.float32
    return torch.empty(splits, *like.shape, dtype=dtype, device=like.device)


def _merged(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the splits."""
    return parts[0].to(dtype) if len(parts) == 1 else parts.sum(0).to(dtype)


def _no_seed(e: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=e.device)


def _options(options: LogitOptions) -> tuple[float, float]:
    return options.scale, options.softcap or 1.0


def _flags(bias: Tensor | None, options: LogitOptions) -> dict[str, object]:
    return {
        "HAS_BIAS": bias is not None, "SOFTCAP": options.softcap is not None, "SAMPLED": False,
        "KIND": 0, "STRATIFIED": False, "HITS": 0, "CORRECTED": False,
    }  # fmt: skip


def _blocks(config: TileConfig, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BM": config.rows, "BN": config.columns, "BD": config.width, "NUM_D": config.num_parts,
        "UPCAST": upcasts(dtype), "PRECISION": precision(dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
