"""Self-attention over packed sequences: groups of similar length, so that padding stays small."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

_CANDIDATES = 24
"""Lengths at which a group may end; more cost more time to choose from than they save."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Time model of the attention of one group, forward and backward, in any one unit.

    Attributes
    ----------
    group : float
        Of a group whatever its size.
    token : float
        Of one padded token.
    pair : float
        Of one query with one key, all heads.
    """

    group: float
    token: float
    pair: float


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive sequences that are padded to one length for attention alone.

    Attributes
    ----------
    first, last : int
        Sequences `first:last` of the batch.
    length : int
        Tokens of the longest.
    slot : int
        Where its padded tokens begin among those of all groups.
    """

    first: int
    last: int
    length: int
    slot: int


class GroupedLayout:
    """Where each token of a packed batch lies when its groups are padded on the right.

    With padding on the right, causal attention never looks at a padded key.

    Parameters
    ----------
    lengths : ndarray, shape (S,), int64
        Tokens of each sequence, ascending.
    device : torch.device
    costs : Costs
        What the choice of groups minimises.
    """

    def __init__(self, lengths: npt.NDArray[np.int64], device: torch.device, costs: Costs) -> None:
        self.lengths = lengths
        self.groups: list[Group] = []
        slots = np.empty(len(lengths), dtype=np.int64)
        total = 0
        for first, last in _split(lengths, costs):
            length = int(lengths[last - 1])
            self.groups.append(Group(first, last, length, total))
            slots[first:last] = total + np.arange(last - first) * length
            total += (last - first) * length
        self.num_tokens = int(lengths.sum())
        self.num_slots = total
        self.is_packed = total == self.num_tokens
        if not self.is_packed:
            begins = np.cumsum(lengths) - lengths
            offsets = torch.from_numpy(np.stack([slots - begins, lengths])).to(
                device, non_blocking=True
            )
            self.slot_of_token = torch.repeat_interleave(
                offsets[0], offsets[1], output_size=self.num_tokens
            ) + torch.arange(self.num_tokens, device=device)
            # a padded slot reads token 0: what it holds is never used
            self.token_of_slot = torch.zeros(total, dtype=torch.int64, device=device)
            self.token_of_slot[self.slot_of_token] = torch.arange(self.num_tokens, device=device)

    def pad(self, tokens: Tensor) -> Tensor:
        """Lay packed tokens out in slots, shape (T, n) to (num_slots, n)."""
        if self.is_packed:
            return tokens
        padded: Tensor = _Pad.apply(tokens, self.token_of_slot, self.slot_of_token)  # type: ignore[no-untyped-call]
        return padded

    def unpad(self, slots: Tensor) -> Tensor:
        """Take the tokens back out of their slots, shape (num_slots, n) to (T, n)."""
        if self.is_packed:
            return slots
        packed: Tensor = _Unpad.apply(slots, self.slot_of_token)  # type: ignore[no-untyped-call]
        return packed


def attend(
    query: Tensor,
    key_value: Tensor,
    layout: GroupedLayout,
    *,
    num_heads: int,
    dropout_rate: float,
    causal: bool,
    sink: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:
    """Multi-head attention of each sequence to itself.

    Parameters
    ----------
    query : Tensor, shape (T, d)
        Projected queries of packed tokens.
    key_value : Tensor, shape (T, 2 d)
        Projected keys and values, side by side.
    layout : GroupedLayout
        Groups of the batch.
    num_heads : int
    dropout_rate : float
        Of the attention weights; 0 outside training.
    causal : bool
        Whether a token sees only itself and what came before.
    sink : (Tensor, Tensor, int), optional
        Key and value (each of shape (d,)) that every padded position of the reference shares,
        and the window's length. They count as one more key whose logit is raised by the log of
        the number of padded positions, which is what attending to all of them amounts to.

    Returns
    -------
    Tensor, shape (T, d)
    """
    query, key_value = layout.pad(query), layout.pad(key_value)
    width = query.shape[1]
    outputs = []
    for group in layout.groups:
        count = group.last - group.first
        rows = slice(group.slot, group.slot + count * group.length)
        shape = (count, group.length, -1, num_heads, width // num_heads)
        (q,) = query[rows].view(shape).transpose(1, 3).unbind(2)
        k, v = key_value[rows].view(shape).transpose(1, 3).unbind(2)
        mask = None
        if sink is not None:
            k, v = _with_sink(k, sink[0]), _with_sink(v, sink[1])
            mask = _sink_mask(layout, group, sink[2], q)
        elif not causal:
            mask = _length_mask(layout, group, q.device)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_rate, is_causal=causal and mask is None
        )
        outputs.append(output.transpose(1, 2).reshape(-1, width))
    return layout.unpad(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


class _Pad(torch.autograd.Function):
    """Gather whose backward is a gather too: padded slots never receive a gradient."""

    @staticmethod
    def forward(ctx, tokens, token_of_slot, slot_of_token):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot_of_token)
        return tokens.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slot_of_token,) = ctx.saved_tensors
        return grad.index_select(0, slot_of_token), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, slots, slot_of_token):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot_of_token)
        ctx.num_slots = slots.shape[0]
        return slots.index_select(0, slot_of_token)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slot_of_token,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.num_slots, grad.shape[1])
        return padded.index_copy_(0, slot_of_token, grad), None


def _split(lengths: npt.NDArray[np.int64], costs: Costs) -> list[tuple[int, int]]:
    """Boundaries of the groups of least total cost, by dynamic programming."""
    ends = np.unique(lengths)
    if len(ends) > _CANDIDATES:
        steps = np.linspace(0, len(ends) - 1, _CANDIDATES)
        ends = ends[np.ceil(steps).astype(np.int64)]
    bounds = np.concatenate([[0], np.searchsorted(lengths, ends, side="right")])
    each = costs.token * ends + costs.pair * ends * ends.astype(np.float64)
    best = np.zeros(len(bounds))
    origin = np.zeros(len(bounds), dtype=np.int64)
    for j in range(1, len(bounds)):
        total = best[:j] + (bounds[j] - bounds[:j]) * each[j - 1]
        origin[j] = total.argmin()
        best[j] = total[origin[j]] + costs.group
    found: list[tuple[int, int]] = []
    j = len(bounds) - 1
    while j > 0:
        found.append((int(bounds[origin[j]]), int(bounds[j])))
        j = int(origin[j])
    return found[::-1]


def _with_sink(keys: Tensor, sink: Tensor) -> Tensor:
    count, heads, _, width = keys.shape
    first = sink.to(keys.dtype).view(1, heads, 1, width).expand(count, -1, -1, -1)
    return torch.cat([first, keys], dim=2)


def _sink_mask(layout: GroupedLayout, group: Group, window: int, like: Tensor) -> Tensor:
    """Causal mask with the sink's column first, shape (sequences, 1, length, length + 1)."""
    size = group.length
    lengths = layout.lengths[group.first : group.last]
    weight = torch.tensor(
        [math.log(window - n) if n < window else -math.inf for n in lengths.tolist()]
    ).to(like)
    future = torch.full((size, size), -math.inf, device=like.device, dtype=like.dtype).triu_(1)
    mask = torch.empty(len(lengths), 1, size, size + 1, device=like.device, dtype=like.dtype)
    mask[..., 0] = weight.view(-1, 1, 1)
    mask[..., 1:] = future
    return mask


def _length_mask(layout: GroupedLayout, group: Group, device: torch.device) -> Tensor | None:
    """Which keys are tokens, shape (sequences, 1, 1, length); None where all are."""
    lengths = layout.lengths[group.first : group.last]
    if lengths[0] == group.length:
        return None
    ends = torch.from_numpy(lengths).to(device)
    mask = torch.arange(group.length, device=device) < ends.view(-1, 1, 1, 1)
    return mask
