"""SASRec with every sequence padded to the window: what the packed model is held against.

The weights are those of a `trainer.models.sasrec.SASRec`. Padding is on the right, so that causal
attention needs no mask of its own: the fastest padded form there is.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batches import PackedBatch
from trainer.models.network import Predictions
from trainer.models.sasrec import SASRec, SASRecBlock


class PaddedBatch:
    """A packed batch laid out in rows of the window's length.

    Parameters
    ----------
    batch : PackedBatch
        With targets; all sequences have tokens.
    """

    def __init__(self, batch: PackedBatch) -> None:
        lengths = torch.from_numpy(batch.lengths).to(batch.items.device)
        columns = torch.arange(batch.max_seq_len, device=batch.items.device)
        self.mask = columns < lengths[:, None]
        """Which slots hold a token, shape (S, max_seq_len)."""
        self.items = self._lay_out(batch.items)
        self.positions = self._lay_out(batch.positions)
        self.targets = self._lay_out(batch.targets, fill=-100)
        self.valid = self.mask.flatten().nonzero().squeeze(1)
        """Slots of the tokens in packed order, shape (T,)."""
        self.shift = batch.max_seq_len - lengths

    def predictions(
        self, model: SASRec, num_heads: int, dropout_rate: float, *, all_positions: bool
    ) -> Predictions:
        """Hidden states and targets, of tokens in packed order or of all positions.

        Parameters
        ----------
        model : SASRec
            Whose weights are used.
        num_heads : int
        dropout_rate : float
            As in the packed model.
        all_positions : bool
            Keep padded positions, with the target -100 that cross-entropy ignores.
        """
        states = _hidden(model, self, num_heads, dropout_rate).flatten(0, 1)
        targets = self.targets.flatten()
        if all_positions:
            return Predictions(states, targets)
        return Predictions(states[self.valid], targets[self.valid])

    def _lay_out(self, values: Tensor, fill: int = 0) -> Tensor:
        return values.new_full(self.mask.shape, fill).masked_scatter_(self.mask, values)

    def left(self, values: Tensor) -> Tensor:
        """Rows with their padding moved to the left."""
        size = values.shape[1]
        columns = torch.arange(size, device=values.device)
        return values.gather(1, (columns - self.shift[:, None]) % size)


def lay_out(model: Any, batch: PackedBatch) -> PaddedBatch:
    """Padded form of a batch for the model at hand."""
    return PaddedBatch(batch)


def left_padded(batches: list[PaddedBatch]) -> dict[str, np.ndarray]:
    """Items, targets and mask of all batches with padding on the left, (batches, S, L) each."""
    found = {
        "items": [b.left(b.items) for b in batches],
        "targets": [b.left(b.targets.clamp_min(0)) for b in batches],
        "mask": [b.left(b.mask) for b in batches],
    }
    return {name: torch.stack(values).cpu().numpy() for name, values in found.items()}


def _hidden(model: SASRec, batch: PaddedBatch, num_heads: int, rate: float) -> Tensor:
    """Hidden states of all positions, shape (S, max_seq_len, d)."""
    width = model.item_embedding.shape[1]
    x = F.embedding(batch.items, model.item_embedding) * width**0.5
    x = F.dropout(x + F.embedding(batch.positions, model.position_embedding), rate)
    for block in model.blocks:
        assert isinstance(block, SASRecBlock)
        x = _block(block, x, num_heads, rate)
    states: Tensor = model.output_norm(x)
    return states


def _block(block: SASRecBlock, x: Tensor, num_heads: int, rate: float) -> Tensor:
    rows, length, width = x.shape
    normed = block.attention_norm(x)
    q = F.linear(normed, block.in_weight[:width], block.in_bias[:width])
    k, v = F.linear(x, block.in_weight[width:], block.in_bias[width:]).chunk(2, dim=-1)
    q, k, v = (t.view(rows, length, num_heads, -1).transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
    attended = block.out(attended.transpose(1, 2).reshape(rows, length, width))
    x = block.feed_forward_norm(normed + attended)
    inner = F.dropout(F.relu(block.inner(x)), rate)
    return x + F.dropout(block.outer(inner), rate)
