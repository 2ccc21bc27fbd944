"""SASRec and BERT4Rec on padded windows, written for plainness: the oracle of the packed models.

Inputs are windows (B, L) padded on the left; `real` marks their tokens. Weights are those of the
packed model, by name.
"""

import math

import torch
import torch.nn.functional as F


def to_windows(sequences, length):
    """Left-padded int64 windows and their mask, from the last `length` items of each sequence."""
    items = torch.zeros(len(sequences), length, dtype=torch.int64)
    real = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        kept = torch.as_tensor(sequence[-length:])
        if len(kept):
            items[row, -len(kept) :] = kept
            real[row, -len(kept) :] = True
    return items, real


def padded_sasrec(weights, items, real, *, num_blocks, num_heads, attend_padding, dropout=0.0):
    """Hidden states (B, L, d) of padded SASRec.

    With `attend_padding` every earlier position is a key, padded or not, as in the paper's code;
    without, a token sees only real ones.
    """
    batch, length = items.shape
    width = weights["item_embedding"].shape[1]
    x = weights["item_embedding"][items] * math.sqrt(width) + weights["position_embedding"]
    x = F.dropout(x, dropout) * real[..., None]
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    if not attend_padding:
        # a padded query keeps itself as key, so that no row of the softmax is empty
        allowed = (allowed & real[:, None, None, :]) | torch.eye(length, dtype=torch.bool)
    for number in range(num_blocks):
        at = f"blocks.{number}."
        q = norm(x, weights, at + "attention_norm")
        in_weight, in_bias = weights[at + "in_weight"], weights[at + "in_bias"]
        attended = attention(q, x, x, in_weight, in_bias, allowed, num_heads, dropout)
        x = q + F.linear(attended, weights[at + "out.weight"], weights[at + "out.bias"])
        x = norm(x, weights, at + "feed_forward_norm")
        inner = F.linear(x, weights[at + "inner.weight"], weights[at + "inner.bias"]).relu()
        inner = F.dropout(inner, dropout)
        outer = F.linear(inner, weights[at + "outer.weight"], weights[at + "outer.bias"])
        x = (x + F.dropout(outer, dropout)) * real[..., None]
    return norm(x, weights, "output_norm")


def attention(q, k, v, in_weight, in_bias, allowed, num_heads, dropout=0.0):
    """Attention of padded windows with full masks, before the output projection."""
    batch, length, width = q.shape
    parts = [
        F.linear(x, w, b).view(batch, length, num_heads, -1).transpose(1, 2)
        for x, w, b in zip((q, k, v), in_weight.chunk(3), in_bias.chunk(3), strict=True)
    ]
    logits = parts[0] @ parts[1].mT / math.sqrt(width // num_heads)
    weights = F.dropout(logits.masked_fill(~allowed, -math.inf).softmax(-1), dropout)
    return (weights @ parts[2]).transpose(1, 2).reshape(batch, length, width)


def norm(x, weights, name, eps=1e-8):
    """LayerNorm by the name of its parameters."""
    shape = (x.shape[-1],)
    return F.layer_norm(x, shape, weights[name + ".weight"], weights[name + ".bias"], eps)
