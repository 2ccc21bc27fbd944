"""What the transformer blocks of all models share: their parameters and how they are drawn."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.attention import Costs, GroupedLayout, attend


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network with a norm each; a model says how they are joined.

    Parameters
    ----------
    width, inner_width : int
        Width d of tokens, and of the feed-forward network's inner layer.
    num_heads : int
        Heads of attention.
    dropout_rate : float
        Of attention weights and activations.
    eps : float
        Added to the variance in both norms.
    """

    def __init__(
        self, width: int, *, inner_width: int, num_heads: int, dropout_rate: float, eps: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.in_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_bias = nn.Parameter(torch.empty(3 * width))
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.inner = nn.Linear(width, inner_width)
        self.outer = nn.Linear(inner_width, width)
        self._num_heads = num_heads
        self._dropout_rate = dropout_rate

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw Xavier normal matrices, zero attention biases and uniform feed-forward biases.

        Parameters
        ----------
        generator : torch.Generator
            On the device of the parameters.
        """
        for weight in (self.in_weight, self.out.weight, self.inner.weight, self.outer.weight):
            nn.init.xavier_normal_(weight, generator=generator)
        for bias in (self.in_bias, self.out.bias):
            nn.init.zeros_(bias)
        for layer in (self.inner, self.outer):
            bound = 1.0 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        self.attention_norm.reset_parameters()
        self.feed_forward_norm.reset_parameters()

    @property
    def rate(self) -> float:
        """Dropout probability as of now: 0 outside training."""
        return self._dropout_rate if self.training else 0.0

    def attention(
        self,
        query: Tensor,
        key_value: Tensor,
        layout: GroupedLayout,
        *,
        causal: bool,
        window: int | None = None,
    ) -> Tensor:
        """Heads of attention side by side, before the output projection, shape (T, d).

        Parameters
        ----------
        query, key_value : Tensor, shape (T, d)
            Packed tokens that queries, and keys and values, are projected from.
        layout : GroupedLayout
            Groups of the batch.
        causal : bool
            Whether a token sees only itself and what came before.
        window : int, optional
            Length of the window, to attend to its padded positions.
        """
        width = query.shape[1]
        # a padded position holds zeros, so its key and value are the biases
        key, value = self.in_bias[width : 2 * width], self.in_bias[2 * width :]
        return attend(
            F.linear(query, self.in_weight[:width], self.in_bias[:width]),
            F.linear(key_value, self.in_weight[width:], self.in_bias[width:]),
            layout,
            num_heads=self._num_heads,
            dropout_rate=self.rate,
            causal=causal,
            sink=None if window is None else (key, value, window),
        )


def attention_costs(width: int, num_heads: int) -> Costs:
    """Nanoseconds on one CPU core, measured; groups chosen by them suit a GPU as well."""
    return Costs(group=150_000.0, token=2.0 * width, pair=8.0 * num_heads + 0.15 * width)
