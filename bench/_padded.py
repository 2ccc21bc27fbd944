"""Models with every sequence padded to the window: what packed ones are held against.

The weights are those of the packed model. Padding is on the right, so that SASRec's causal
attention needs no mask of its own: the fastest padded form there is.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from db.spec import RunSpec
from trainer.data.batches import PackedBatch
from trainer.models.bert4rec import BERT4Rec, BERT4RecBlock, mask_tokens
from trainer.models.network import Predictions
from trainer.models.sasrec import SASRec, SASRecBlock


class PaddedBatch:
    """A packed batch laid out in rows of the window's length.

    Parameters
    ----------
    batch : PackedBatch
        All sequences have tokens.
    spec : RunSpec
        Of the model.
    seed : int
        Of BERT4Rec's masks.
    """

    def __init__(self, batch: PackedBatch, spec: RunSpec, seed: int) -> None:
        self._spec = spec
        lengths = torch.from_numpy(batch.lengths).to(batch.items.device)
        columns = torch.arange(batch.max_seq_len, device=batch.items.device)
        self._shift = batch.max_seq_len - lengths
        self.real = columns < lengths[:, None]
        """Which slots hold a token, shape (S, max_seq_len)."""
        self.items = self._lay_out(batch.items)
        self.positions = self._lay_out(batch.positions)
        if spec.model == "bert4rec":
            hidden = mask_tokens(batch, spec.mask_probability, seed)
            targets = batch.items.masked_fill(~hidden, -100)
        else:
            hidden = torch.zeros_like(batch.items, dtype=torch.bool)
            targets = batch.targets
        self.masked = self._lay_out(hidden)
        self.targets = self._lay_out(targets, fill=-100)
        self.valid = (self.targets >= 0).flatten().nonzero().squeeze(1)
        """Slots of the targets in packed order, shape (N,)."""

    def predictions(
        self, model: Any, dropout_rate: float, *, all_positions: bool = False
    ) -> Predictions:
        """Hidden states and targets, of the valid ones in packed order or of all positions.

        Parameters
        ----------
        model : SASRec or BERT4Rec
            Whose weights are used.
        dropout_rate : float
            As in the packed model.
        all_positions : bool
            Keep all positions; the target -100 is one that cross-entropy ignores.
        """
        states = self._hidden(model, dropout_rate).flatten(0, 1)
        targets = self.targets.flatten()
        if all_positions:
            return Predictions(states, targets)
        return Predictions(states[self.valid], targets[self.valid])

    def left(self, values: Tensor) -> Tensor:
        """Rows with their padding moved to the left."""
        size = values.shape[1]
        columns = torch.arange(size, device=values.device)
        return values.gather(1, (columns - self._shift[:, None]) % size)

    def _lay_out(self, values: Tensor, fill: int = 0) -> Tensor:
        return values.new_full(self.real.shape, fill).masked_scatter_(self.real, values)

    def _hidden(self, model: SASRec | BERT4Rec, rate: float) -> Tensor:
        """Hidden states of all positions, shape (S, max_seq_len, d)."""
        heads = self._spec.num_heads
        x = F.embedding(self.items, model.item_embedding)
        if isinstance(model, BERT4Rec):
            x = torch.where(self.masked[..., None], model.mask_embedding, x)
            x = F.dropout(x + F.embedding(self.positions, model.position_embedding), rate)
            for block in model.blocks:
                x = _bert4rec_block(block, x, heads, rate, self.real)  # type: ignore[arg-type]
            return x
        x = x * x.shape[-1] ** 0.5 + F.embedding(self.positions, model.position_embedding)
        x = F.dropout(x, rate)
        for block in model.blocks:
            x = _sasrec_block(block, x, heads, rate)  # type: ignore[arg-type]
        states: Tensor = model.output_norm(x)
        return states


def left_padded(batches: list[PaddedBatch]) -> dict[str, np.ndarray]:
    """Batches with padding on the left, each array of shape (batches, S, L)."""
    found = {
        "items": [b.left(b.items) for b in batches],
        "targets": [b.left(b.targets.clamp_min(0)) for b in batches],
        "mask": [b.left(b.real) for b in batches],
        "masked": [b.left(b.masked) for b in batches],
    }
    return {name: torch.stack(values).cpu().numpy() for name, values in found.items()}


def _sasrec_block(block: SASRecBlock, x: Tensor, heads: int, rate: float) -> Tensor:
    normed = block.attention_norm(x)
    x = normed + block.out(_attention(block, normed, x, heads, rate, None))
    x = block.feed_forward_norm(x)
    inner = F.dropout(F.relu(block.inner(x)), rate)
    return x + F.dropout(block.outer(inner), rate)


def _bert4rec_block(
    block: BERT4RecBlock, x: Tensor, heads: int, rate: float, real: Tensor
) -> Tensor:
    normed = block.attention_norm(x)
    x = x + F.dropout(block.out(_attention(block, normed, normed, heads, rate, real)), rate)
    inner = F.dropout(F.gelu(block.inner(block.feed_forward_norm(x))), rate)
    return F.dropout(x + F.dropout(block.outer(inner), rate), rate)


def _attention(
    block: Any, query: Tensor, key_value: Tensor, heads: int, rate: float, real: Tensor | None
) -> Tensor:
    rows, length, width = query.shape
    projected = (
        F.linear(query, block.in_weight[:width], block.in_bias[:width]),
        *F.linear(key_value, block.in_weight[width:], block.in_bias[width:]).chunk(2, dim=-1),
    )
    q, k, v = (t.view(rows, length, heads, -1).transpose(1, 2) for t in projected)
    mask = None if real is None else real[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=rate, is_causal=mask is None
    )
    return attended.transpose(1, 2).reshape(rows, length, width)
