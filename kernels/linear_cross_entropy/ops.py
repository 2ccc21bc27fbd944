"""The losses' two custom operators, their gradients, and the choice between torch and Triton.

As `torch.library` operators they pass through `torch.compile`, activation checkpointing and
gradient accumulation: whatever is random depends on a seed that is one of the arguments.
"""

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from kernels.linear_cross_entropy import torch_chunked, torch_fused, torch_sampled
from kernels.linear_cross_entropy.problem import (
    GradientFilter,
    LogitOptions,
    accumulation_dtype,
)
from kernels.sampling import SamplingPlan

Result = TypeVar("Result")
Sums = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor | None]
_warned: set[str] = set()


def warn_once(text: str) -> None:
    """Warn of a text that was not warned of in this process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def triton_or_torch(impl: str, triton: Callable[[], Result], torch: Callable[[], Result]) -> Result:
    """What `impl` computes; by torch, with one warning, where a GPU has too little for a kernel."""
    if impl != "triton":
        return torch()
    from triton.runtime.errors import OutOfResources

    try:
        return triton()
    except OutOfResources as problem:
        warn_once(f"impl='triton' falls back to 'torch': {problem}")
        return torch()


def triton_module(name: str) -> ModuleType:
    """Module of Triton launches, imported where it is first needed: Triton may be absent."""
    return importlib.import_module(f"kernels.linear_cross_entropy.triton_{name}")


@torch.library.custom_op("srsweep::full_softmax", mutates_args=())
def full_softmax(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    scale: float,
    softcap: float | None,
    with_mean: bool,
    filter_mode: int,
    filter_eps: float,
    accum_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target logit and mean logit of every token, without keeping logits."""
    arguments = (e, weight, bias, target, LogitOptions(scale, softcap))
    sums: Sums = triton_or_torch(
        impl,
        lambda: triton_module("full").forward(*arguments, with_mean=with_mean),
        lambda: torch_chunked.forward(*arguments, with_mean=with_mean),
    )
    return sums


@torch.library.custom_op("srsweep::full_softmax_backward", mutates_args=())
def full_softmax_backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    grad_positive: Tensor,
    grad_mean: Tensor | None,
    scale: float,
    softcap: float | None,
    filter_mode: int,
    filter_eps: float,
    accum_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e, weight and bias (empty without one), each tile of logits computed again."""
    options = LogitOptions(scale, softcap)
    grad_filter = GradientFilter(filter_mode, filter_eps)
    arguments = (
        e, weight, bias, target, lse, grad_lse, grad_positive, grad_mean, options, grad_filter,
        seed, accum_dtype,
    )  # fmt: skip
    grads: Gradients = triton_or_torch(
        impl,
        lambda: triton_module("full").backward(*arguments),
        lambda: torch_chunked.backward(*arguments),
    )
    grad_e, grad_weight, grad_bias = grads
    return grad_e, grad_weight, e.new_empty(0) if grad_bias is None else grad_bias


@full_softmax.register_fake
def _full_softmax_fake(
    e: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(e.dtype)
    return tuple(e.new_empty(e.shape[0], dtype=dtype) for _ in range(3))  # type: ignore[return-value]


@full_softmax_backward.register_fake
def _full_softmax_backward_fake(
    e: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = e.new_empty(0) if bias is None else torch.empty_like(bias)
    return _like(e), _like(weight), grad_bias


def _full_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    e, weight, bias, target, seed, *ctx.options = inputs
    ctx.save_for_backward(e, weight, bias, target, seed, output[0])


def _full_backward(ctx, grad_lse, grad_positive, grad_mean):  # type: ignore[no-untyped-def]
    e, weight, bias, target, seed, lse = ctx.saved_tensors
    scale, softcap, with_mean, filter_mode, filter_eps, accum_dtype, impl = ctx.options
    grads = full_softmax_backward(
        e, weight, bias, target, seed, lse, grad_lse, grad_positive,
        grad_mean if with_mean else None, scale, softcap, filter_mode, filter_eps, accum_dtype,
        impl,
    )  # fmt: skip
    return (*_bias_or_none(grads, bias), *(None,) * 9)


full_softmax.register_autograd(_full_backward, setup_context=_full_setup)


@torch.library.custom_op("srsweep::full_softmax_total", mutates_args=())
def full_softmax_total(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of the losses of a CPU's tokens; its gradients are found at once and kept."""
    found = torch_fused.forward_and_gradients(e, weight, bias, target, token_weight, scale)
    grad_bias = e.new_empty(0) if found.grad_bias is None else found.grad_bias
    return found.total, found.grad_e, found.grad_weight, grad_bias


@torch.library.custom_op("srsweep::full_softmax_total_backward", mutates_args=())
def full_softmax_total_backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad_e: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients kept, times the one from above; a derivative of theirs is refused.

    An operator, and one that is given the leaves, so that autograd finds no formula for what it
    would otherwise take for constants.
    """
    return grad_e * grad_total, grad_weight * grad_total, grad_bias * grad_total


@full_softmax_total.register_fake
def _full_softmax_total_fake(
    e: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return e.new_empty(()), *_full_softmax_backward_fake(e, weight, bias)


full_softmax_total_backward.register_fake(_full_softmax_backward_fake)


def _full_total_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _full_total_backward(ctx, grad_total, *_unused):  # type: ignore[no-untyped-def]
    if grad_total is None:
        return (None,) * 6
    tensors = ctx.saved_tensors
    grads = full_softmax_total_backward(*tensors, grad_total)
    return (*_bias_or_none(grads, tensors[2]), None, None, None)


full_softmax_total.register_autograd(_full_total_backward, setup_context=_full_total_setup)


@torch.library.custom_op("srsweep::sampled_sum", mutates_args=())
def sampled_sum(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    source: Tensor | None,
    alias: Tensor | None,
    log_q: Tensor | None,
    pool_size: Tensor | None,
    log_rest: Tensor | None,
    kind: int,
    num: int,
    share: int,
    skip_positive: bool,
    stratified: bool,
    hits: int,
    conditional: bool,
    corrected: bool,
    base_shift: float,
    sigmoid: bool,
    scale: float,
    softcap: float | None,
    filter_mode: int,
    filter_eps: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over each token's negatives, target logit and shift, without keeping ids or logits."""
    plan = _plan(
        weight, seed, source, alias, log_q, pool_size, log_rest, kind, num, share, skip_positive,
        stratified, hits, conditional, corrected, base_shift,
    )  # fmt: skip
    arguments = (e, weight, bias, target, plan, LogitOptions(scale, softcap))
    sums: Sums = triton_or_torch(
        impl,
        lambda: triton_module("sampled").forward(*arguments, sigmoid=sigmoid),
        lambda: torch_sampled.forward(*arguments, sigmoid=sigmoid),
    )
    return sums


@torch.library.custom_op("srsweep::sampled_sum_backward", mutates_args=())
def sampled_sum_backward(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    seed: Tensor,
    source: Tensor | None,
    alias: Tensor | None,
    log_q: Tensor | None,
    pool_size: Tensor | None,
    log_rest: Tensor | None,
    negative: Tensor,
    positive: Tensor,
    shift: Tensor,
    grad_negative: Tensor,
    grad_positive: Tensor,
    kind: int,
    num: int,
    share: int,
    skip_positive: bool,
    stratified: bool,
    hits: int,
    conditional: bool,
    corrected: bool,
    base_shift: float,
    sigmoid: bool,
    scale: float,
    softcap: float | None,
    filter_mode: int,
    filter_eps: float,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of e, weight and bias (empty without one), the negatives drawn again."""
    plan = _plan(
        weight, seed, source, alias, log_q, pool_size, log_rest, kind, num, share, skip_positive,
        stratified, hits, conditional, corrected, base_shift,
    )  # fmt: skip
    arguments = (
        e, weight, bias, target, negative, positive, shift, grad_negative, grad_positive, plan,
        LogitOptions(scale, softcap), GradientFilter(filter_mode, filter_eps), deterministic,
    )  # fmt: skip
    grads: Gradients = triton_or_torch(
        impl,
        lambda: triton_module("sampled").backward(*arguments, sigmoid=sigmoid),
        lambda: torch_sampled.backward(*arguments, sigmoid=sigmoid),
    )
    grad_e, grad_weight, grad_bias = grads
    return grad_e, grad_weight, e.new_empty(0) if grad_bias is None else grad_bias


@sampled_sum.register_fake
def _sampled_sum_fake(
    e: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(e.dtype)
    return tuple(e.new_empty(e.shape[0], dtype=dtype) for _ in range(3))  # type: ignore[return-value]


@sampled_sum_backward.register_fake
def _sampled_sum_backward_fake(
    e: Tensor, weight: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = e.new_empty(0) if bias is None else torch.empty_like(bias)
    return _like(e), _like(weight), grad_bias


_NUM_SAMPLED_TENSORS = 10


def _sampled_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.options = inputs[_NUM_SAMPLED_TENSORS:]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:_NUM_SAMPLED_TENSORS], *output)


def _sampled_backward(ctx, grad_negative, grad_positive, _grad_shift):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    grads = sampled_sum_backward(*tensors, grad_negative, grad_positive, *ctx.options)
    none = (None,) * (_NUM_SAMPLED_TENSORS - 3 + len(ctx.options))
    return (*_bias_or_none(grads, tensors[2]), *none)


sampled_sum.register_autograd(_sampled_backward, setup_context=_sampled_setup)


def call_sampled_sum(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    *,
    sigmoid: bool,
    deterministic: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """`sampled_sum` of a plan: sum over the negatives and target logit, shape (N,) each."""
    negative, positive, _ = sampled_sum(
        e, weight, bias, target, plan.seed, plan.source, plan.alias, plan.log_q, plan.pool_size,
        plan.log_rest, plan.kind, plan.num, plan.share, plan.skip_positive, plan.stratified,
        plan.hits, plan.conditional, plan.corrected, plan.base_shift, sigmoid, options.scale,
        options.softcap, grad_filter.mode, grad_filter.eps, deterministic, impl,
    )  # fmt: skip
    return negative, positive


def _plan(
    weight: Tensor,
    seed: Tensor,
    source: Tensor | None,
    alias: Tensor | None,
    log_q: Tensor | None,
    pool_size: Tensor | None,
    log_rest: Tensor | None,
    kind: int,
    num: int,
    share: int,
    skip_positive: bool,
    stratified: bool,
    hits: int,
    conditional: bool,
    corrected: bool,
    base_shift: float,
) -> SamplingPlan:
    return SamplingPlan(
        kind=kind,
        num=num,
        share=share,
        num_items=len(weight),
        skip_positive=skip_positive,
        stratified=stratified,
        hits=hits,
        conditional=conditional,
        corrected=corrected,
        base_shift=base_shift,
        seed=seed,
        source=source,
        alias=alias,
        log_q=log_q,
        pool_size=pool_size,
        log_rest=log_rest,
    )


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _bias_or_none(
    grads: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return grads[0], grads[1], None if bias is None else grads[2]
