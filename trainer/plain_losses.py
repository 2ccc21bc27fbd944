"""Plain torch losses: the baselines that hold every logit or every gathered item vector.

T targets, V items of the catalog, d the width of hidden states, N negatives per target.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy over the whole catalog with all T x V logits in memory.

    The baseline that other losses are compared with: nothing but valid targets is computed, and
    the logits are held once, in the precision of the matrix products. Their gradient takes their
    place, where autograd over `torch.nn.functional.cross_entropy` would hold three such matrices.

    Parameters
    ----------
    hidden : Tensor, shape (T, d)
    weight : Tensor, shape (V, d)
        Item vectors.
    targets : Tensor, shape (T,), int64
    bias : Tensor, shape (V,), optional
        Item biases.
    target_weight : Tensor, shape (T,), optional
        How many equal targets a row stands for.

    Returns
    -------
    Tensor, shape (), float32
        Mean over targets; its backward can run once.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if target_weight is None:
        share = torch.full((len(targets),), 1.0 / len(targets), device=hidden.device)
    else:
        share = target_weight.float() / target_weight.sum()
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _MaterialisedCrossEntropy.apply(hidden, weight, bias, targets, share)  # type: ignore[no-untyped-call]
    return loss


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    bias: Tensor | None = None,
    correction: bool = True,
) -> Tensor:
    """Cross-entropy over the target and its own uniform negatives (CE-), gathered per target.

    A negative that equals the target takes no part. The others stand for the V - 1 items besides
    the target: each logit is raised by log(V - 1) - log(N - hits). A target whose negatives all
    hit has loss 0.

    Parameters
    ----------
    hidden : Tensor, shape (T, d)
    weight : Tensor, shape (V, d)
    targets : Tensor, shape (T,), int64
    negatives : Tensor, shape (T, N), int64
        Drawn uniformly from all V items.
    bias : Tensor, shape (V,), optional
    correction : bool
        Whether logits are raised as above.

    Returns
    -------
    Tensor, shape ()
        Mean over targets.
    """
    positive, negative = _positive_and_negative(hidden, weight, targets, negatives, bias)
    hit = negatives == targets[:, None]
    if correction:
        misses = (negatives.shape[1] - hit.sum(dim=1, keepdim=True)).clamp_min(1)
        negative = negative + (math.log(weight.shape[0] - 1) - misses.log())
    negative = negative.masked_fill(hit, -math.inf)
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets))


def binary_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of the target and its negatives, from logits.

    Parameters
    ----------
    hidden : Tensor, shape (T, d)
    weight : Tensor, shape (V, d)
    targets : Tensor, shape (T,), int64
    negatives : Tensor, shape (T, N), int64
    bias : Tensor, shape (V,), optional

    Returns
    -------
    Tensor, shape ()
        Sum over a target and its negatives, mean over targets.
    """
    positive, negative = _positive_and_negative(hidden, weight, targets, negatives, bias)
    total = F.softplus(-positive.float()).sum() + F.softplus(negative.float()).sum()
    return total / targets.shape[0]


def uniform_items(
    num_rows: int, num: int, num_items: int, seed: int, device: torch.device
) -> Tensor:
    """Independent uniform items, shape (num_rows, num), int64."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(num_items, (num_rows, num), generator=generator, device=device)


def uniform_others(targets: Tensor, num: int, num_items: int, seed: int) -> Tensor:
    """Independent uniform items besides each target, shape (T, num), int64."""
    drawn = uniform_items(len(targets), num, num_items - 1, seed, targets.device)
    return drawn + (drawn >= targets[:, None])


def _positive_and_negative(
    hidden: Tensor, weight: Tensor, targets: Tensor, negatives: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores of the target, shape (T, 1), and of its negatives, shape (T, N).

    One gather for both: the backward pass of each fills a gradient of the size of `weight`.
    """
    items = torch.cat([targets[:, None], negatives], dim=1)
    scores = _scores(hidden, weight, items, bias)
    return scores[:, :1], scores[:, 1:]


def _scores(hidden: Tensor, weight: Tensor, items: Tensor, bias: Tensor | None) -> Tensor:
    """Scores of each row's own items, shape (T, N)."""
    scores = torch.bmm(F.embedding(items, weight), hidden[:, :, None]).squeeze(2)
    return scores if bias is None else scores + F.embedding(items, bias[:, None]).squeeze(2)


_CELLS_CPU = 2**18
_CELLS_CUDA = 2**27
"""Logits that the softmax looks at together: what fits the cache, or enough to fill a GPU."""


class _MaterialisedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies over one buffer: logits first, then their gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, share):  # type: ignore[no-untyped-def]
        logits = F.linear(hidden, weight, bias)
        normaliser = torch.empty(len(logits), device=logits.device)
        for rows in _row_blocks(logits):
            torch.logsumexp(logits[rows].float(), dim=1, out=normaliser[rows])
        chosen = logits.gather(1, targets[:, None]).squeeze(1).float()
        ctx.save_for_backward(hidden, weight, targets, share, normaliser)
        ctx.logits, ctx.has_bias = logits, bias is not None
        return torch.dot(normaliser - chosen, share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, weight, targets, share, normaliser = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        scale = share * grad
        for rows in _row_blocks(logits):
            # in place for fp32, by way of an fp32 block otherwise
            block = logits[rows].float()
            block.sub_(normaliser[rows, None]).exp_()
            block.scatter_add_(
                1, targets[rows, None], block.new_full((), -1.0).expand(len(block), 1)
            )
            block.mul_(scale[rows, None])
            if logits.dtype != block.dtype:
                logits[rows] = block
        bias_grad = logits.sum(dim=0) if ctx.has_bias else None
        return logits @ weight, logits.T @ hidden, bias_grad, None, None


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    cells = _CELLS_CUDA if logits.device.type == "cuda" else _CELLS_CPU
    rows = max(cells // logits.shape[1], 1)
    for begin in range(0, len(logits), rows):
        yield slice(begin, begin + rows)
