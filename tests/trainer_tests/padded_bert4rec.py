"""BERT4Rec on padded windows, written for plainness: the oracle of the packed model."""

import torch
import torch.nn.functional as F
from padded_reference import attention, norm


def padded_bert4rec(weights, items, real, masked, *, num_blocks, num_heads):
    """Hidden states (B, L, d); `real` marks tokens, `masked` those whose item is hidden."""
    x = torch.where(masked[..., None], weights["mask_embedding"], weights["item_embedding"][items])
    x = x + weights["position_embedding"]
    length = items.shape[1]
    # a padded query keeps itself as key, so that no row of the softmax is empty
    allowed = real[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    for number in range(num_blocks):
        at = f"blocks.{number}."
        q = norm(x, weights, at + "attention_norm", eps=1e-5)
        in_weight, in_bias = weights[at + "in_weight"], weights[at + "in_bias"]
        attended = attention(q, q, q, in_weight, in_bias, allowed, num_heads)
        y = x + F.linear(attended, weights[at + "out.weight"], weights[at + "out.bias"])
        z = norm(y, weights, at + "feed_forward_norm", eps=1e-5)
        inner = F.gelu(F.linear(z, weights[at + "inner.weight"], weights[at + "inner.bias"]))
        x = y + F.linear(inner, weights[at + "outer.weight"], weights[at + "outer.bias"])
    return x
