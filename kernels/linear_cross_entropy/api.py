"""Cross-entropy and binary cross-entropy of a linear layer over a large catalog.

`linear_cross_entropy` is the full softmax (CCE) or, with `negatives`, the sampled one (CCE-);
`linear_binary_cross_entropy` is BCE, BCE+ and gBCE. The logits never exist as a whole.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.linear_cross_entropy import checks, ops, reference, torch_fused
from kernels.linear_cross_entropy.problem import GradientFilter, LogitOptions
from kernels.negatives import Negatives
from kernels.sampling import SamplingPlan, make_plan, new_seed

Impl = Literal["auto", "triton", "torch", "dense", "reference"]
Reduction = Literal["mean", "sum", "none"]


class ImplChoice(NamedTuple):
    """Which implementation computes a loss, and why."""

    name: str
    """`triton`, `torch`, `dense` or `reference`."""
    reason: str
    """One sentence."""


def linear_cross_entropy(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    negatives: Negatives | None = None,
    filter_eps: float | None = None,
    filter_mode: Literal["drop", "unbiased"] = "drop",
    accum_dtype: torch.dtype = torch.float32,
    deterministic: bool | None = None,
    impl: Impl = "auto",
    paper_compat: bool = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax cross-entropy of `e @ weight.T`, over all items or over sampled negatives.

    The loss of token i with target y is :math:`\log Z_i - z_{iy}` with :math:`Z_i` over the catalog
    (CCE [1]_), or :math:`Z_i = e^{z_{iy}} + \sum_k e^{z_{ik} - \log n q_k}` over negatives k drawn
    from q (CCE- [2]_ with the logQ correction).

    Parameters
    ----------
    e : Tensor, shape (N, D)
        Hidden states; float32, bfloat16 or float16 (float64 by `torch` only).
    weight : Tensor, shape (V, D)
        Item embeddings, of e's dtype; under autocast both are cast.
    target : Tensor, shape (N,), int64
        Item of each token, or `ignore_index`.
    bias : Tensor, shape (V,), optional
        Added to the dot products.
    ignore_index : int
        Target of tokens that do not count.
    sample_weight : Tensor, shape (N,), optional
        Weight of each token; `mean` divides by their sum.
    num_items : float or Tensor, optional
        What `mean` divides by instead: the number of targets over all micro-batches and ranks.
    softcap, logit_scale : float
        Logits are `softcap * tanh(logit_scale * (e . c + b) / softcap)`.
    label_smoothing : float
        Share of the target's mass spread over the catalog; full softmax only.
    z_loss : float
        Weight of the squared log-partition function.
    reduction : {'mean', 'sum', 'none'}
        `mean` is over the tokens that count; no such token gives 0.
    return_lse : bool
        Also return the log-partition function of every token, differentiable.
    negatives : Negatives, optional
        None is the full softmax.
    filter_eps : float, optional
        Softmax entries below it (before upstream gradients, never the target's) are filtered from
        the backward pass. Without a filter gradients are exact.
    filter_mode : {'drop', 'unbiased'}
        Drop what is filtered, or keep it with probability p / eps and count it as eps.
    accum_dtype : {torch.float32, torch.float64}
        dtype of dC's accumulation; float64 has a torch path only, for the full softmax.
    deterministic : bool, optional
        Equal inputs give equal bits; None asks `torch.are_deterministic_algorithms_enabled()`.
    impl : {'auto', 'triton', 'torch', 'dense', 'reference'}
        `explain` says what `auto` takes. `dense` is plain torch in e's dtype, `reference` in
        float64.
    paper_compat : bool
        Reproduce the paper's CCE-: uniform draws with replacement over all V items, correction
        log(V - 1) - log(ns + 1), and a negative equal to the target keeps logit 0 in Z.
    validate : bool
        Check the targets' range at once, which waits for the device; otherwise an invalid target
        on a GPU raises there, asynchronously.

    Returns
    -------
    loss : Tensor, shape () or (N,), float32
    lse : Tensor, shape (N,), float32
        Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        An argument of wrong shape, dtype, device, range or combination; the text names it.

    Notes
    -----
    On a CPU the plain full softmax of float32 or float64 tensors, reduced to one number, finds its
    gradients in the forward pass where gradients are recorded: it then holds a gradient of
    weight's size until the backward pass, and at most `torch_fused.BUFFER_BYTES` of exponentials
    meanwhile. Beyond `torch_fused.GRADIENT_BYTES`, and under `torch.no_grad`, it does not.

    References
    ----------
    .. [1] Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025,
       arXiv 2411.09009.
    .. [2] "Faster and Memory-Efficient Training of Sequential Recommendation Models for Large
       Catalogs", Algorithms 1 and 2.

    Examples
    --------
    >>> e, weight = torch.randn(5, 8), torch.randn(100, 8)
    >>> target = torch.tensor([3, 14, 15, -100, 92])
    >>> linear_cross_entropy(e, weight, target).shape
    torch.Size([])
    >>> linear_cross_entropy(e, weight, target, negatives=Negatives(16, seed=1)).shape
    torch.Size([])
    """
    e, weight, bias = checks.autocast(e, weight, bias)
    target = checks.check_inputs(e, weight, bias, target, ignore_index, validate)
    options, grad_filter = checks.check_options(
        softcap, logit_scale, label_smoothing, z_loss, filter_eps, filter_mode, negatives
    )
    if paper_compat and negatives is None:
        raise ValueError("paper_compat=True needs negatives: it is about the paper's CCE-")
    checks.check_reduction(reduction, sample_weight, num_items, target)
    checks.check_accumulation(accum_dtype, negatives)
    chosen = _choose(e, weight, impl)
    valid = target >= 0
    if negatives is None:
        if chosen == "triton" and accum_dtype == torch.float64:
            chosen = _fall_back("accum_dtype=torch.float64 has no Triton kernel")
        plain = not (label_smoothing or z_loss or return_lse or grad_filter.mode)
        plain = plain and options.softcap is None and reduction != "none"
        if plain and chosen == "torch" and accum_dtype in (torch.float32, e.dtype):
            token_weight = _token_weight(valid, sample_weight, num_items, reduction, e.dtype)
            if _gradients_can_go_along(e, weight, token_weight):
                total: Tensor
                total, *_ = ops.full_softmax_total(
                    e, weight, bias, target, token_weight, options.scale
                )
                return total
        lse, positive, mean = _full(
            e, weight, bias, target, options, grad_filter, label_smoothing > 0, accum_dtype, chosen
        )
        loss = lse - (1 - label_smoothing) * positive
        if label_smoothing:
            loss = loss - label_smoothing * mean
    else:
        plan = make_plan(negatives, target, len(weight), paper_compat=paper_compat)
        chosen = _choose_for_plan(chosen, plan, e.shape[1])
        negative, positive = _sampled(
            e, weight, bias, target, plan, options, grad_filter, False, deterministic, chosen
        )
        if plan.log_target is not None:
            positive = positive - plan.log_target
        lse = torch.logaddexp(negative, positive)
        loss = lse - positive
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = _reduce(loss, valid, sample_weight, num_items, reduction)
    return (loss, lse) if return_lse else loss


def linear_binary_cross_entropy(
    e: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    negatives: Negatives,
    positive_power: float = 1.0,
    average: bool = False,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    sample_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    deterministic: bool | None = None,
    impl: Impl = "auto",
    validate: bool = False,
) -> Tensor:
    r"""Binary cross-entropy of each target against its sampled negatives: BCE, BCE+ and gBCE.

    The loss of token i is :math:`-\beta \log\sigma(z_{iy}) - \sum_k \log(1 - \sigma(z_{ik}))`.
    One negative is BCE, more are BCE+ (the sum, as in the paper); `average=True` with
    `positive_power=gbce_power(...)` is gBCE [1]_.

    Parameters
    ----------
    e, weight, target, bias, ignore_index, sample_weight, num_items, softcap, logit_scale
        As in `linear_cross_entropy`; so are `reduction`, `deterministic`, `impl` and `validate`.
    negatives : Negatives
        The negatives; `logq` has no meaning here and is not applied.
    positive_power : float
        Power beta of the positive's probability.
    average : bool
        Divide each token's loss by `negatives.num + 1`.

    Returns
    -------
    Tensor, shape () or (N,), float32

    Raises
    ------
    ValueError, TypeError
        An argument of wrong shape, dtype, device or range; the text names it.

    References
    ----------
    .. [1] Petrov and Macdonald, "gSASRec: Reducing Overconfidence in Sequential Recommendation
       Trained with Negative Sampling", RecSys 2023, arXiv 2308.07192, Eqs. 6-12.
    """
    e, weight, bias = checks.autocast(e, weight, bias)
    target = checks.check_inputs(e, weight, bias, target, ignore_index, validate)
    options, grad_filter = checks.check_options(
        softcap, logit_scale, 0.0, 0.0, None, "drop", negatives
    )
    if negatives is None:
        raise TypeError("negatives=None: binary cross-entropy needs Negatives")
    if not (math.isfinite(positive_power) and positive_power > 0):
        raise ValueError(f"positive_power={positive_power} must be a finite number above 0")
    checks.check_reduction(reduction, sample_weight, num_items, target)
    plan = make_plan(negatives, target, len(weight), softmax=False)
    chosen = _choose_for_plan(_choose(e, weight, impl), plan, e.shape[1])
    negative, positive = _sampled(
        e, weight, bias, target, plan, options, grad_filter, True, deterministic, chosen
    )
    loss = positive_power * torch.nn.functional.softplus(-positive) + negative
    if average:
        loss = loss / (negatives.num + 1)
    return _reduce(loss, target >= 0, sample_weight, num_items, reduction)


def gbce_power(num_negatives: int, num_items: int, calibration: float) -> float:
    r"""Power beta of gBCE's positive.

    :math:`\beta = \alpha (t (1 - 1/\alpha) + 1/\alpha)` with sampling rate
    :math:`\alpha = n / (V - 1)`: t = 0 is BCE, t = 1 undoes the overconfidence of sampling.

    Parameters
    ----------
    num_negatives, num_items : int
        n and V.
    calibration : float
        t, in [0, 1].

    References
    ----------
    .. [1] Petrov and Macdonald, RecSys 2023, arXiv 2308.07192, Eq. 12.
    """
    if not 0 <= calibration <= 1:
        raise ValueError(f"calibration={calibration} must lie between 0 and 1")
    if not 1 <= num_negatives <= num_items - 1:
        raise ValueError(
            f"num_negatives={num_negatives} must lie between 1 and the {num_items - 1} items other "
            "than the target"
        )
    alpha = num_negatives / (num_items - 1)
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)


def explain(e: Tensor, weight: Tensor, impl: Impl = "auto") -> ImplChoice:
    """Which implementation `impl` stands for with these tensors, and why."""
    if impl != "auto":
        return ImplChoice(impl, f"impl={impl!r} was asked for")
    obstacle = triton_obstacle(e, weight)
    if obstacle:
        return ImplChoice("torch", obstacle)
    return ImplChoice("triton", f"{e.dtype} on {e.device} is supported by the Triton kernels")


def triton_obstacle(e: Tensor, weight: Tensor) -> str:
    """Why the Triton kernels cannot take these tensors; empty when they can."""
    if e.dtype == torch.float64:
        return "torch.float64 has no Triton kernel"
    if not e.is_cuda:
        return f"the tensors are on {e.device.type}, the Triton kernels need CUDA"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(e.device)
    if torch.version.hip is None and major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return ""


def _full(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LogitOptions,
    grad_filter: GradientFilter,
    with_mean: bool,
    accum_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    seed = new_seed(e.device) if grad_filter.mode else torch.zeros((), dtype=torch.int64)
    if impl in ("dense", "reference"):
        e, weight, bias = _upcast(e, weight, bias, impl)
        return reference.full(e, weight, bias, target, options, grad_filter, seed)
    lse, positive, mean = ops.full_softmax(
        e, weight, bias, target, seed.to(e.device), options.scale, options.softcap, with_mean,
        grad_filter.mode, grad_filter.eps, accum_dtype, impl,
    )  # fmt: skip
    return lse, positive, mean


def _sampled(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    plan: SamplingPlan,
    options: LogitOptions,
    grad_filter: GradientFilter,
    sigmoid: bool,
    deterministic: bool | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl in ("dense", "reference"):
        e, weight, bias = _upcast(e, weight, bias, impl)
        return reference.sampled(
            e, weight, bias, target, plan, options, grad_filter, sigmoid=sigmoid
        )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return ops.call_sampled_sum(
        e, weight, bias, target, plan, options, grad_filter,
        sigmoid=sigmoid, deterministic=deterministic, impl=impl,
    )  # fmt: skip


def _gradients_can_go_along(e: Tensor, weight: Tensor, token_weight: Tensor) -> bool:
    """Whether a CPU finds the gradients in the forward pass: wanted, and within its memory."""
    wanted = torch.is_grad_enabled() and e.requires_grad and weight.requires_grad
    known = not token_weight.requires_grad
    if not (wanted and known and e.device.type == "cpu"):
        return False
    full = e.dtype in (torch.float32, torch.float64)
    return full and torch_fused.block_tokens(len(e), weight) > 0


def _token_weight(
    valid: Tensor,
    sample_weight: Tensor | None,
    num_items: float | Tensor | None,
    reduction: Reduction,
    dtype: torch.dtype,
) -> Tensor:
    """What each token's loss is multiplied by before all are summed."""
    weight = valid.to(dtype)
    if sample_weight is not None:
        weight = torch.where(valid, sample_weight.to(dtype), 0.0)
    if reduction != "mean":
        return weight
    if num_items is not None:
        return weight / num_items
    count = weight.sum()
    return weight / torch.where(count == 0, 1.0, count)


def _reduce(
    loss: Tensor,
    valid: Tensor,
    sample_weight: Tensor | None,
    num_items: float | Tensor | None,
    reduction: Reduction,
) -> Tensor:
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss if sample_weight is None else loss * sample_weight.to(loss.dtype)
    return (loss * _token_weight(valid, sample_weight, num_items, reduction, loss.dtype)).sum()


def _upcast(
    e: Tensor, weight: Tensor, bias: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    if impl == "dense":
        return e, weight, bias
    return e.double(), weight.double(), None if bias is None else bias.double()


def _choose(e: Tensor, weight: Tensor, impl: str) -> str:
    if impl not in ("auto", "triton", "torch", "dense", "reference"):
        raise ValueError(f"impl={impl!r} must be 'auto', 'triton', 'torch', 'dense' or 'reference'")
    if impl == "auto":
        choice = explain(e, weight)
        if choice.name != "triton" and e.is_cuda:
            return _fall_back(choice.reason)
        return choice.name
    if impl == "triton":
        obstacle = _explicit_triton_obstacle(e, weight)
        if obstacle:
            return _fall_back(obstacle)
    return impl


def _choose_for_plan(chosen: str, plan: SamplingPlan, width: int) -> str:
    if chosen != "triton":
        return chosen
    import kernels.linear_cross_entropy.triton_sampled as triton_sampled

    obstacle = triton_sampled.obstacle(plan, width)
    return _fall_back(obstacle) if obstacle else chosen


def _fall_back(reason: str) -> str:
    ops.warn_once(f"impl='triton' falls back to 'torch': {reason}")
    return "torch"


def _explicit_triton_obstacle(e: Tensor, weight: Tensor) -> str:
    try:
        import kernels.linear_cross_entropy.triton_launch as triton_launch
    except ImportError:
        return "triton is not installed"
    if triton_launch.INTERPRETED and not e.is_cuda and e.dtype != torch.float64:
        return ""
    return triton_obstacle(e, weight)
