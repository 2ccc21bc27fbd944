"""Checks of the losses' arguments: each error names the argument, what it got and what it takes."""

import math

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import FILTER_MODES, GradientFilter, LogitOptions
from kernels.negatives import Negatives

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast(
    e: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tensors in the dtype that autocast asks for; float64 stays."""
    for name, tensor in (("e", e), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    device = e.device.type
    if not torch.is_autocast_enabled(device) or e.dtype == torch.float64:
        return e, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return e.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_inputs(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    validate: bool,
) -> Tensor:
    """Check shapes, dtypes, devices and range; return targets with -1 where ignored."""
    named = {"e": e, "weight": weight, "target": target}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor; gather it first ({name}.full_tensor()), sharded catalogs "
                "are not supported"
            )
        if tensor.device != e.device:
            raise ValueError(f"{name} is on {tensor.device} but e is on {e.device}; move one")
    shapes = {"e": ("N, D", 2), "weight": ("V, D", 2), "target": ("N,", 1), "bias": ("V,", 1)}
    for name, tensor in named.items():
        axes, dims = shapes[name]
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give ({axes})")
    for name, got, size in (
        ("weight", weight.shape[1], e.shape[1]),
        ("target", len(target), len(e)),
        ("bias", len(weight) if bias is None else len(bias), len(weight)),
    ):
        if got != size:
            raise ValueError(
                f"{name} has shape {tuple(named[name].shape)}, which does not fit e of shape "
                f"{tuple(e.shape)} and weight of shape {tuple(weight.shape)}"
            )
    if len(weight) == 0 or e.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it needs at least one item")
    if e.dtype not in _DTYPES:
        raise TypeError(f"e has dtype {e.dtype}; give float32, bfloat16, float16 or float64")
    for name in ("weight", "bias"):
        if name in named and named[name].dtype != e.dtype:
            raise TypeError(f"{name} has dtype {named[name].dtype} but e has {e.dtype}; cast one")
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; give torch.int64")
    return _check_range(target, ignore_index, len(weight), validate)


def _check_range(target: Tensor, ignore_index: int, num_items: int, validate: bool) -> Tensor:
    if 0 <= ignore_index < num_items:
        target = target.masked_fill(target == ignore_index, -1)
        inside = (target >= -1) & (target < num_items)
    else:
        inside = ((target >= 0) & (target < num_items)) | (target == ignore_index)
        target = torch.where(target == ignore_index, -1, target)
    if validate or (not target.is_cuda and not torch.compiler.is_compiling()):
        if not bool(inside.all()):
            wrong = int((~inside).nonzero()[0, 0])
            raise ValueError(
                f"target[{wrong}]={int(target[wrong])} is outside [0, {num_items}) and is not "
                f"ignore_index={ignore_index}"
            )
    else:
        torch._assert_async(inside.all(), f"target is outside [0, {num_items})")
    return target


def check_options(
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    filter_eps: float | None,
    filter_mode: str,
    negatives: Negatives | None,
) -> tuple[LogitOptions, GradientFilter]:
    """Check what shapes logits and filters gradients; return both as the kernels take them."""
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be a finite number above 0, or None")
    if negatives is not None and not isinstance(negatives, Negatives):
        raise TypeError(f"negatives is a {type(negatives).__name__}; give Negatives(...) or None")
    if not math.isfinite(logit_scale) or logit_scale == 0:
        raise ValueError(f"logit_scale={logit_scale} must be finite and not 0")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie between 0 and 1")
    if label_smoothing and negatives is not None:
        raise ValueError(
            f"label_smoothing={label_smoothing} spreads over the whole catalog; it needs "
            "negatives=None"
        )
    if not (math.isfinite(z_loss) and z_loss >= 0):
        raise ValueError(f"z_loss={z_loss} must be a finite number of at least 0")
    if filter_mode not in FILTER_MODES:
        raise ValueError(f"filter_mode={filter_mode!r} must be 'drop' or 'unbiased'")
    if filter_eps is None:
        return LogitOptions(float(logit_scale), softcap), GradientFilter()
    if not 0 < filter_eps < 1:
        raise ValueError(f"filter_eps={filter_eps} is a probability between 0 and 1, or None")
    options = LogitOptions(float(logit_scale), softcap)
    return options, GradientFilter(FILTER_MODES[filter_mode], filter_eps)


def check_accumulation(accum_dtype: torch.dtype, negatives: Negatives | None) -> None:
    """Check the dtype of dC's accumulation."""
    if accum_dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"accum_dtype={accum_dtype} would lose gradients of rare items; give torch.float32 or "
            "torch.float64"
        )
    if accum_dtype == torch.float64 and negatives is not None:
        raise ValueError(
            "accum_dtype=torch.float64 is for the full softmax; it needs negatives=None"
        )


def check_reduction(
    reduction: str,
    sample_weight: Tensor | None,
    num_items: float | Tensor | None,
    target: Tensor,
) -> None:
    """Check how tokens' losses are weighed and reduced."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
    if not isinstance(num_items, Tensor | None) and not num_items > 0:
        raise ValueError(f"num_items={num_items} divides the loss; give a number above 0")
    if sample_weight is None:
        return
    if not isinstance(sample_weight, Tensor):
        raise TypeError(
            f"sample_weight is a {type(sample_weight).__name__}; give a torch.Tensor of shape (N,)"
        )
    if sample_weight.shape != target.shape:
        raise ValueError(
            f"sample_weight has shape {tuple(sample_weight.shape)} but target has "
            f"{tuple(target.shape)}"
        )
    if sample_weight.device != target.device:
        raise ValueError(f"sample_weight is on {sample_weight.device}, target on {target.device}")
