"""BERT4Rec on packed tokens: masked items are predicted from both sides, and nothing else is."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.batches import IntArray, PackedBatch
from trainer.models.attention import GroupedLayout
from trainer.models.block import TransformerBlock, attention_costs
from trainer.models.network import Predictions, SequenceModel

_EPS = 1e-5


class BERT4Rec(SequenceModel):
    """Bidirectional recommender trained to fill in masked items.

    The network is the one of RePlay: norms in front, a GELU feed-forward network of width 4 d,
    no norm at the end, and a bias per item in the scores.

    Parameters
    ----------
    num_items : int
        Catalog size V.
    max_seq_len : int
        Length of the window; when ranking, its last position holds the mask.
    embedding_dim, num_blocks, num_heads : int
        Width d, transformer blocks, attention heads.
    dropout_rate : float
        In embeddings, attention weights, feed-forward and after each block.
    mask_probability : float
        Probability that a token is masked in training.
    tied_head : bool
        Score with the input's item vectors; otherwise with vectors of their own, which doubles
        the parameters of a large catalog.

    References
    ----------
    F. Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations
    from Transformer", arXiv:1904.06690.
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
        mask_probability: float,
        tied_head: bool = True,
    ) -> None:
        super().__init__()
        self.item_embedding = nn.Parameter(torch.empty(num_items, embedding_dim))
        self.mask_embedding = nn.Parameter(torch.empty(embedding_dim))
        self.position_embedding = nn.Parameter(torch.empty(max_seq_len, embedding_dim))
        self.blocks = nn.ModuleList(
            BERT4RecBlock(embedding_dim, num_heads, dropout_rate) for _ in range(num_blocks)
        )
        self.head_weight = (
            None if tied_head else nn.Parameter(torch.empty(num_items, embedding_dim))
        )
        self.head_bias = nn.Parameter(torch.empty(num_items))
        self._window = max_seq_len
        self._dropout_rate = dropout_rate
        self._mask_probability = mask_probability
        self._costs = attention_costs(embedding_dim, num_heads)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw initial weights: Xavier normal tables and matrices, small item biases.

        Parameters
        ----------
        generator : torch.Generator
            On the device of the parameters.
        """
        nn.init.xavier_normal_(self.item_embedding, generator=generator)
        nn.init.xavier_normal_(self.mask_embedding[None], generator=generator)
        nn.init.xavier_normal_(self.position_embedding, generator=generator)
        for block in self.blocks:
            block.reset_parameters(generator)  # type: ignore[operator]
        if self.head_weight is None:
            nn.init.normal_(self.head_bias, std=0.01, generator=generator)
            return
        nn.init.xavier_normal_(self.head_weight, generator=generator)
        bound = 1.0 / math.sqrt(self.head_weight.shape[1])
        nn.init.uniform_(self.head_bias, -bound, bound, generator=generator)

    @property
    def output_weight(self) -> Tensor:
        """Item vectors that hidden states are multiplied with, shape (V, d)."""
        return self.item_embedding if self.head_weight is None else self.head_weight

    @property
    def output_bias(self) -> Tensor:
        """Item biases of the scores, shape (V,)."""
        return self.head_bias

    def forward(
        self,
        items: Tensor,
        positions: Tensor,
        masked: Tensor,
        lengths: IntArray,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of packed tokens.

        Parameters
        ----------
        items, positions : Tensor, shape (T,), int64
            Item of each token, and its place in the window.
        masked : Tensor, shape (T,), bool
            Tokens whose item is hidden.
        lengths : ndarray, shape (S,), int64
            Tokens of each sequence, ascending.
        keep : Tensor, shape (N,), int64, optional
            Tokens whose states are wanted; the last block computes its feed-forward network for
            them alone.

        Returns
        -------
        Tensor, shape (T, d) or (N, d)
        """
        layout = GroupedLayout(lengths, items.device, self._costs)
        x = F.embedding(items, self.item_embedding)
        x = torch.where(masked[:, None], self.mask_embedding, x)
        x = x + F.embedding(positions, self.position_embedding)
        x = F.dropout(x, self._dropout_rate, self.training)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, layout, keep if number == last else None)
        return x

    def predictions(self, batch: PackedBatch, seed: int) -> Predictions:
        """Hidden states of masked tokens with their items.

        Parameters
        ----------
        batch : PackedBatch
            With every item as input.
        seed : int
            Of the choice of masked tokens.
        """
        masked = mask_tokens(batch, self._mask_probability, seed)
        keep = masked.nonzero().squeeze(1)
        hidden = self(batch.items, batch.positions, masked, batch.lengths, keep)
        return Predictions(hidden, batch.items[keep])

    def encode(self, batch: PackedBatch) -> Tensor:
        """State of a mask that follows each user's history.

        The mask takes the last position of the window, so one item fewer is seen than in training.

        Parameters
        ----------
        batch : PackedBatch
            Histories as inputs.

        Returns
        -------
        Tensor, shape (B, d)
            In the order of `batch.users`; users without history get the state of a lone mask.
        """
        empty = len(batch.users) - len(batch.lengths)
        kept = np.concatenate(
            [np.zeros(empty, dtype=np.int64), np.minimum(batch.lengths, self._window - 1)]
        )
        lengths = kept + 1
        ends = torch.from_numpy(np.cumsum(lengths) - 1).to(batch.items.device)
        masked = torch.zeros(int(lengths.sum()), dtype=torch.bool, device=batch.items.device)
        masked[ends] = True
        # a token at the window's first position has no place left once all move up by one
        stays = batch.positions > 0
        items = torch.zeros_like(masked, dtype=torch.int64)
        positions = torch.full_like(items, self._window - 1)
        items[~masked] = batch.items[stays]
        positions[~masked] = batch.positions[stays] - 1
        states: Tensor = self(items, positions, masked, lengths, ends)
        return states


def mask_tokens(batch: PackedBatch, probability: float, seed: int) -> Tensor:
    """Choose the tokens to be predicted, at least one of every sequence.

    Each token is masked independently. A sequence without a mask gets its last token masked; one
    that is masked throughout, if longer than one, keeps its last token but one.

    Parameters
    ----------
    batch : PackedBatch
    probability : float
        That a token is masked.
    seed : int
        Equal seeds give equal masks for equal batches.

    Returns
    -------
    Tensor, shape (T,), bool
    """
    device = batch.items.device
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.rand(batch.num_tokens, generator=generator, device=device)
    masked = drawn < probability
    last = batch.last_tokens()
    lengths = torch.from_numpy(batch.lengths).to(device)
    counts = torch.cumsum(masked, 0)[last].diff(prepend=lengths.new_zeros(1))
    masked[last] |= counts == 0
    full = (counts == lengths) & (lengths > 1)
    masked[last[full] - 1] = False
    return masked


class BERT4RecBlock(TransformerBlock):
    """One transformer block of BERT4Rec.

    Parameters
    ----------
    width, num_heads : int
        Width d of tokens, heads of attention.
    dropout_rate : float
        Of attention weights, both residual branches, feed-forward activations and the output.
    """

    def __init__(self, width: int, num_heads: int, dropout_rate: float) -> None:
        super().__init__(
            width, inner_width=4 * width, num_heads=num_heads, dropout_rate=dropout_rate, eps=_EPS
        )

    def forward(self, x: Tensor, layout: GroupedLayout, keep: Tensor | None) -> Tensor:
        """Tokens after the block, shape (T, d), or (N, d) for the N that are kept.

        Parameters
        ----------
        x : Tensor, shape (T, d)
            Packed tokens.
        layout : GroupedLayout
            Their groups.
        keep : Tensor, shape (N,), int64, optional
            Tokens to be computed past attention.
        """
        normed = self.attention_norm(x)
        attended = self.attention(normed, normed, layout, causal=False)
        if keep is not None:
            x, attended = x.index_select(0, keep), attended.index_select(0, keep)
        y = x + self._drop(self.out(attended))
        inner = self._drop(F.gelu(self.inner(self.feed_forward_norm(y))))
        return self._drop(y + self._drop(self.outer(inner)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate, self.training)
