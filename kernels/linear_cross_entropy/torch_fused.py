"""The full softmax in torch on a CPU, its gradients found on the way forward.

Where all that will come from above is one number, the weight of every token is known before the
backward pass, and a logit need be computed and exponentiated once: three matrix products and one
exponential in place of four and two. A block of tokens meets the whole catalog; its exponentials
stay in a buffer of at most `BUFFER_BYTES` until their sums are known, which then scale the tokens'
rows rather than the buffer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_cross_entropy.problem import MAX_PLAIN_LOGIT, largest_logit

BUFFER_BYTES = 2**28
"""Bound of the exponentials that are kept."""
GRADIENT_BYTES = 2**29
"""Largest dC that may wait for the backward pass, which returns a scaled copy of it."""
MAX_BLOCK = 128
"""Tokens that meet the catalog at once; more gained nothing in time."""
MIN_BLOCK = 32
"""Fewer tokens than this read and write dC so often that recomputing logits is as fast."""
_VECTOR = 16
"""Columns that a matrix product works on at once; 67 tokens took 15 % longer than 64."""
TILE_ELEMENTS = 2**18
"""Logits of a thread's tile: 1 MiB in float32, which its cache holds from step to step."""


class Fused(NamedTuple):
    """Weighted sum of the losses and its gradients."""

    total: Tensor
    grad_e: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def block_tokens(num_tokens: int, weight: Tensor) -> int:
    """Tokens per block with this catalog; 0 where the bounds on memory leave too few."""
    num_items, width = weight.shape
    if num_items * width * weight.element_size() > GRADIENT_BYTES:
        return 0
    fitting = min(MAX_BLOCK, BUFFER_BYTES // max(num_items * weight.element_size(), 1))
    if fitting > _VECTOR:
        fitting -= fitting % _VECTOR
    return fitting if fitting >= min(MIN_BLOCK, num_tokens) else 0


def forward_and_gradients(
    e: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    scale: float,
) -> Fused:
    """Weighted sum of the tokens' losses, and the gradients of that sum.

    Parameters
    ----------
    e : Tensor, shape (N, D)
        Hidden states, float32 or float64, on a CPU.
    weight : Tensor, shape (V, D)
        Item embeddings; `block_tokens` has to be above 0.
    bias : Tensor, shape (V,), optional
        Added to the dot products.
    target : Tensor, shape (N,), int64
        Items; negative where a token is ignored.
    token_weight : Tensor, shape (N,)
        Factor of each token's loss.
    scale : float
        Multiplies dot products and bias.
    """
    counted = (target >= 0).nonzero().flatten()
    everyone = len(counted) == len(target)
    rows = e.detach() if everyone else e.detach()[counted]
    target, token_weight = target[counted], token_weight.detach()[counted].to(e.dtype)
    weight = weight.detach()
    total = e.new_zeros(())
    grad_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    if len(rows) == 0:
        return Fused(total, torch.zeros_like(e), grad_weight, grad_bias)
    catalog = _Catalog(weight, bias, scale, block_tokens(len(rows), weight))
    shifted = not bool(largest_logit(rows, weight, bias, scale) <= MAX_PLAIN_LOGIT)
    for start in range(0, len(rows), catalog.block):
        tokens = slice(start, start + catalog.block)
        block, items, factor = rows[tokens], target[tokens], token_weight[tokens]
        log_sum, mean_item, shares = catalog.softmax(block, shifted=shifted)
        hit = weight[items]
        positive = (block * hit).sum(1)
        if bias is not None:
            positive += bias.detach()[items]
        total += torch.dot(factor, log_sum - scale * positive)
        slope = (factor * scale)[:, None]
        grad_rows[tokens] = (mean_item - hit) * slope
        catalog.add_outer(grad_weight, grad_bias, block * slope, slope, shares)
        grad_weight.index_add_(0, items, block * slope, alpha=-1)
        if grad_bias is not None:
            grad_bias.index_add_(0, items, slope[:, 0].contiguous(), alpha=-1)
    grad_e = grad_rows
    if not everyone:
        grad_e = torch.zeros_like(e, memory_format=torch.contiguous_format)
        grad_e[counted] = grad_rows
    return Fused(total, grad_e, grad_weight, grad_bias)


class _Catalog:
    """All items, and the exponentials of one block of tokens with each of them.

    The buffer has an item's tokens side by side: dC, the larger gradient, is then a product of
    untransposed matrices.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, block: int) -> None:
        self.block = block
        self.weight = weight
        self.units = scale / math.log(2)  # the exponential to base 2 takes half the time
        self.bias = None if bias is None else bias.detach()[:, None] * self.units
        threads = torch.get_num_threads()
        per_thread = max(TILE_ELEMENTS // self.block, 1)
        self.tile = threads * min(per_thread, max(-(-len(weight) // threads), 1))
        self.items = _split(weight, self.tile)
        # Each thread sums over the items that it has in its cache, where they can be dealt evenly.
        parts = [threads if len(items) % threads == 0 else 1 for items in self.items]
        self.parts = max(parts, default=1)
        self.summed = [
            items.reshape(number, len(items) // number, -1).mT
            for number, items in zip(parts, self.items, strict=True)
        ]
        self.memory = weight.new_empty(len(weight) * self.block)
        self.ones = weight.new_ones(1, 1, self.tile)

    def _buffer(self, size: int) -> list[Tensor]:
        """Room for a block's logits, tile by tile of items."""
        return _split(self.memory[: len(self.weight) * size].view(-1, size), self.tile)

    def softmax(self, block: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log-sum-exp and mean item of each token, and the shares of each tile's exponentials.

        Parameters
        ----------
        block : Tensor, shape (n, D)
            Tokens; the buffer keeps their exponentials.
        shifted : bool
            Whether logits may be large: exponentials are then relative to the largest so far.
        """
        turned = (block * self.units).T.contiguous()
        size = len(block)
        sums = block.new_zeros(self.parts, 1, size)
        mean = block.new_zeros(self.parts, block.shape[1], size)
        top = block.new_full((size,), torch.finfo(block.dtype).min if shifted else 0.0)
        tops = []
        biases: list[Tensor] | list[None] = [None] * len(self.items)
        if self.bias is not None:
            biases = _split(self.bias, self.tile)
        for items, bias, summed, exponentials in zip(
            self.items, biases, self.summed, self._buffer(size), strict=True
        ):
            if bias is None:
                torch.mm(items, turned, out=exponentials)
            else:
                torch.addmm(bias, items, turned, out=exponentials)
            if shifted:
                before, top = top, torch.maximum(top, exponentials.amax(0))
                fading = torch.exp2(before - top)
                sums *= fading
                mean *= fading
                exponentials.sub_(top)
            tops.append(top)
            exponentials.exp2_()
            parts, _, length = summed.shape
            tiles = exponentials.view(parts, length, size)
            sums[:parts].baddbmm_(self.ones[..., :length].expand(parts, 1, length), tiles)
            mean[:parts].baddbmm_(summed, tiles)
        total = sums.sum((0, 1))
        log_sum = torch.log2(total).add_(top).mul_(math.log(2))
        shares = [torch.exp2(then - top) / total for then in tops]
        return log_sum, (mean.sum(0) / total).T, shares

    def add_outer(
        self,
        grad_weight: Tensor,
        grad_bias: Tensor | None,
        rows: Tensor,
        factor: Tensor,
        shares: list[Tensor],
    ) -> None:
        """Add the softmax's part of a block's gradients to those of the items.

        Parameters
        ----------
        rows : Tensor, shape (n, D)
            Tokens times `factor`, which has shape (n, 1).
        shares : list of Tensor, shape (n,)
            From `softmax`.
        """
        grads = _split(grad_weight, self.tile)
        grads_bias = grads if grad_bias is None else _split(grad_bias, self.tile)
        for exponentials, share, grad, grad_of_bias in zip(
            self._buffer(len(rows)), shares, grads, grads_bias, strict=True
        ):
            grad.addmm_(exponentials, rows * share[:, None])
            if grad_bias is not None:
                grad_of_bias.addmv_(exponentials, factor[:, 0] * share)


def _split(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]
