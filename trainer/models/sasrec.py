"""SASRec on packed tokens: no padded position is ever computed outside attention's groups."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batches import PackedBatch
from trainer.models.attention import GroupedLayout
from trainer.models.block import TransformerBlock, attention_costs
from trainer.models.network import Predictions, SequenceModel

_EPS = 1e-8


class SASRec(SequenceModel):
    """Self-attentive sequential recommender with tied item embeddings.

    The block is the one of RePlay and the paper: queries are normed, keys and values are not, and
    both residuals start from the normed tensor.

    Parameters
    ----------
    num_items : int
        Catalog size V.
    max_seq_len : int
        Length of the window; positions are counted from its end.
    embedding_dim, num_blocks, num_heads : int
        Width d, transformer blocks, attention heads.
    dropout_rate : float
        In embeddings, attention weights and feed-forward.
    attend_padding : bool
        Let tokens attend to the padded positions of the reference, without computing them.
    predict_first_item : bool
        Predict the first item of a sequence that does not fill the window from padding.
    count_padding : bool
        Count every padded position as a target labelled item 0.

    References
    ----------
    W.-C. Kang, J. McAuley, "Self-Attentive Sequential Recommendation", arXiv:1808.09781.
    """

    def __init__(
        self,
        num_items: int,
        *,
        max_seq_len: int,
        embedding_dim: int,
        num_blocks: int,
        num_heads: int,
        dropout_rate: float,
        attend_padding: bool = False,
        predict_first_item: bool = False,
        count_padding: bool = False,
    ) -> None:
        super().__init__()
        self.item_embedding = nn.Parameter(torch.empty(num_items, embedding_dim))
        self.position_embedding = nn.Parameter(torch.empty(max_seq_len, embedding_dim))
        self.blocks = nn.ModuleList(
            SASRecBlock(embedding_dim, num_heads, dropout_rate) for _ in range(num_blocks)
        )
        self.output_norm = nn.LayerNorm(embedding_dim, eps=_EPS)
        self._scale = math.sqrt(embedding_dim)
        self._window = max_seq_len
        self._dropout_rate = dropout_rate
        self._attend_padding = attend_padding
        self._predict_first_item = predict_first_item
        self._count_padding = count_padding
        self._costs = attention_costs(embedding_dim, num_heads)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw initial weights: Xavier normal matrices, zero attention biases.

        Parameters
        ----------
        generator : torch.Generator
            On the device of the parameters.
        """
        num_items, width = self.item_embedding.shape
        # the reference's table has one more row, for padding
        std = math.sqrt(2.0 / (num_items + 1 + width))
        nn.init.normal_(self.item_embedding, std=std, generator=generator)
        nn.init.xavier_normal_(self.position_embedding, generator=generator)
        for block in self.blocks:
            cast(SASRecBlock, block).reset_parameters(generator)
        self.output_norm.reset_parameters()

    @property
    def output_weight(self) -> Tensor:
        """Item vectors that hidden states are multiplied with, shape (V, d)."""
        return self.item_embedding

    @property
    def output_bias(self) -> None:
        """Scores have no bias."""
        return

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states of all tokens, shape (T, d)."""
        rate = self._dropout_rate if self.training else 0.0
        layout = GroupedLayout(batch.lengths, batch.items.device, self._costs)
        window = self._window if self._attend_padding else None
        x = F.embedding(batch.items, self.item_embedding) * self._scale
        x = x + F.embedding(batch.positions, self.position_embedding)
        x = F.dropout(x, rate, self.training)
        for block in self.blocks:
            x = block(x, layout, window)
        hidden: Tensor = self.output_norm(x)
        return hidden

    def predictions(self, batch: PackedBatch, seed: int) -> Predictions:
        """Hidden states with the items that they are to predict.

        Parameters
        ----------
        batch : PackedBatch
            With next items.
        seed : int
            Not used: SASRec draws nothing but dropout.
        """
        hidden, targets = self(batch), batch.targets
        # every padded position of the reference ends as the bias of the last norm
        padding = self.output_norm.bias
        if self._predict_first_item and batch.first_items.shape[0]:
            count = batch.first_items.shape[0]
            hidden = torch.cat([hidden, padding.to(hidden.dtype).expand(count, -1)])
            targets = torch.cat([targets, batch.first_items])
        if not self._count_padding:
            return Predictions(hidden, targets)
        weight = torch.ones(len(targets) + 1, device=hidden.device)
        weight[-1] = batch.num_padded
        return Predictions(
            torch.cat([hidden, padding.to(hidden.dtype)[None]]),
            torch.cat([targets, targets.new_zeros(1)]),
            weight,
        )

    def encode(self, batch: PackedBatch) -> Tensor:
        """Hidden state from which each user's next item is ranked.

        Returns
        -------
        Tensor, shape (B, d)
            In the order of `batch.users`; users without history get the state of padding.
        """
        empty = len(batch.users) - len(batch.lengths)
        states = [self.output_norm.bias.expand(empty, -1)] if empty else []
        if len(batch.lengths):
            states.append(self(batch)[batch.last_tokens()])
        return torch.cat(states)


class SASRecBlock(TransformerBlock):
    """One transformer block of SASRec.

    Parameters
    ----------
    width, num_heads : int
        Width d of tokens, heads of attention.
    dropout_rate : float
        Of attention weights and feed-forward activations.
    """

    def __init__(self, width: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__(
            width, inner_width=width, num_heads=num_heads, dropout_rate=dropout_rate, eps=_EPS
        )

    def forward(self, x: Tensor, layout: GroupedLayout, window: int | None) -> Tensor:
        """Tokens after the block, shape (T, d).

        Parameters
        ----------
        x : Tensor, shape (T, d)
            Packed tokens.
        layout : GroupedLayout
            Their groups.
        window : int, optional
            Length of the window, to attend to its padded positions.
        """
        normed = self.attention_norm(x)
        attended = self.attention(normed, x, layout, causal=True, window=window)
        x = self.feed_forward_norm(normed + self.out(attended))
        inner = F.dropout(F.relu(self.inner(x)), self.rate, self.training)
        return x + F.dropout(self.outer(inner), self.rate, self.training)
