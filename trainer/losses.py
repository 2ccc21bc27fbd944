"""The loss that a run asks for, with its knobs unpacked and its negatives seeded by the step.

`ce`, `ce_minus` and `bce` are the plain baselines; the others come from `kernels`, which never
materialises logits. All see valid targets only.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from db.errors import SpecError
from db.spec import RunSpec
from kernels.linear_cross_entropy.api import (
    gbce_power,
    linear_binary_cross_entropy,
    linear_cross_entropy,
)
from kernels.negatives import Negatives
from kernels.scalable import scalable_cross_entropy
from trainer.models.network import Predictions
from trainer.plain_losses import (
    binary_cross_entropy,
    cross_entropy,
    sampled_cross_entropy,
    uniform_items,
    uniform_others,
)
from trainer.seeds import derive

LossFunction = Callable[[Predictions, Tensor, Tensor | None, int], Tensor]
"""Mean loss from predictions, item vectors (V, d), item biases (V,) or None, and the step."""


def make_loss(spec: RunSpec, num_items: int, item_counts: Tensor | None = None) -> LossFunction:
    """Loss of a run.

    Parameters
    ----------
    spec : RunSpec
    num_items : int
        Catalog size V.
    item_counts : Tensor, shape (V,), optional
        Training rows of each item, on the device of training: what the popularity and
        log-uniform samplers go by.

    Raises
    ------
    SpecError
        As many negatives as items, or a sampler without item counts.
    """
    num = spec.num_negatives
    if num is not None and num >= num_items:
        raise SpecError(
            f"num_negatives={num} is not below the {num_items} items of {spec.dataset!r}; "
            "lower it, or use loss 'ce' or 'cce' with null for the full softmax"
        )
    seed = functools.partial(derive, spec.seed, "negatives")
    match spec.loss:
        case "ce":
            return _full
        case "ce_minus":
            return functools.partial(
                _sampled, num=num or 0, correction=spec.logq_correction, seed=seed
            )
        case "bce":
            return functools.partial(_binary, num=num or 0, seed=seed)
        case "cce":
            return functools.partial(
                _fused_full, filter_eps=spec.filter_eps, filter_mode=spec.filter_mode
            )
        case "sce":
            return functools.partial(
                _scalable,
                seed=seed,
                alpha=spec.sce_alpha,
                beta=spec.sce_beta,
                bucket_size_x=spec.sce_bucket_size_x,
                bucket_size_y=spec.sce_bucket_size_y,
                mix=spec.sce_mix,
            )
    negatives = make_negatives(spec, item_counts)
    if spec.loss == "cce_minus":
        return functools.partial(
            _fused_sampled,
            negatives=negatives,
            seed=seed,
            filter_eps=spec.filter_eps,
            filter_mode=spec.filter_mode,
            paper_compat=spec.paper_negatives,
        )
    # gBCE is BCE+ whose positive is raised to a power, averaged over the items of each target
    calibrated = spec.loss == "gbce"
    power = gbce_power(negatives.num, num_items, spec.gbce_t) if calibrated else 1.0
    return functools.partial(
        _fused_binary, negatives=negatives, seed=seed, positive_power=power, average=calibrated
    )


def make_negatives(spec: RunSpec, item_counts: Tensor | None) -> Negatives:
    """How the kernels draw the negatives of a run.

    Raises
    ------
    SpecError
        The sampler goes by popularity and no item counts are given.
    """
    sampler = spec.negative_sampler
    ranking = None
    if sampler in ("popularity", "log_uniform") and item_counts is None:
        raise SpecError(
            f"negative_sampler={sampler!r} needs the item counts of {spec.dataset!r}; "
            "use uniform or in_batch"
        )
    if sampler == "log_uniform" and item_counts is not None:
        ranking = torch.argsort(item_counts, descending=True, stable=True)
    return Negatives(
        spec.num_negatives or 0,
        sampler=sampler,
        share=spec.negatives_share,
        logq=spec.logq_correction,
        hits=spec.hits,
        item_counts=item_counts if sampler == "popularity" else None,
        ranking=ranking,
    )


Seed = Callable[[int], int]


def _full(made: Predictions, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
    return cross_entropy(made.hidden, weight, made.targets, bias=bias, target_weight=made.weight)


def _sampled(
    made: Predictions,
    weight: Tensor,
    bias: Tensor | None,
    step: int,
    *,
    num: int,
    correction: bool,
    seed: Seed,
) -> Tensor:
    targets = made.targets
    negatives = uniform_items(len(targets), num, len(weight), seed(step), targets.device)
    return sampled_cross_entropy(
        made.hidden, weight, targets, negatives, bias=bias, correction=correction
    )


def _binary(
    made: Predictions, weight: Tensor, bias: Tensor | None, step: int, *, num: int, seed: Seed
) -> Tensor:
    negatives = uniform_others(made.targets, num, len(weight), seed(step))
    return binary_cross_entropy(made.hidden, weight, made.targets, negatives, bias=bias)


def _fused_full(
    made: Predictions, weight: Tensor, bias: Tensor | None, step: int, **options: Any
) -> Tensor:
    loss = linear_cross_entropy(
        made.hidden, weight, made.targets, bias=bias, sample_weight=made.weight, **options
    )
    return cast(Tensor, loss)


def _fused_sampled(
    made: Predictions,
    weight: Tensor,
    bias: Tensor | None,
    step: int,
    *,
    negatives: Negatives,
    seed: Seed,
    **options: Any,
) -> Tensor:
    negatives = negatives.with_seed(seed(step))
    loss = linear_cross_entropy(
        made.hidden, weight, made.targets, bias=bias, negatives=negatives, **options
    )
    return cast(Tensor, loss)


def _fused_binary(
    made: Predictions,
    weight: Tensor,
    bias: Tensor | None,
    step: int,
    *,
    negatives: Negatives,
    seed: Seed,
    **options: Any,
) -> Tensor:
    negatives = negatives.with_seed(seed(step))
    return linear_binary_cross_entropy(
        made.hidden, weight, made.targets, bias=bias, negatives=negatives, **options
    )


def _scalable(
    made: Predictions, weight: Tensor, bias: Tensor | None, step: int, *, seed: Seed, **options: Any
) -> Tensor:
    hidden = made.hidden
    if bias is not None:
        # one more coordinate, always 1, carries the item biases into buckets and logits
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        weight = torch.cat([weight, bias.to(weight.dtype)[:, None]], dim=1)
    return scalable_cross_entropy(hidden, weight, made.targets, seed=seed(step), **options)
