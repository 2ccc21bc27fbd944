import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.models.attention import Costs, GroupedLayout, attend

CPU = torch.device("cpu")


def cost_of(groups, costs):
    return sum(
        costs.group + (g.last - g.first) * (costs.token * g.length + costs.pair * g.length**2)
        for g in groups
    )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    group=st.floats(0.0, 200.0),
)
def test_groups_cost_the_least_possible(lengths, group):
    lengths = np.sort(np.array(lengths))
    costs = Costs(group=group, token=1.0, pair=0.5)
    layout = GroupedLayout(lengths, CPU, costs)
    found = cost_of(layout.groups, costs)
    # every way to cut the sorted lengths
    cuts = len(lengths) - 1
    for choice in range(2**cuts):
        bounds = [0] + [i + 1 for i in range(cuts) if choice >> i & 1] + [len(lengths)]
        other = sum(
            group + (b - a) * (lengths[b - 1] + 0.5 * lengths[b - 1] ** 2)
            for a, b in itertools.pairwise(bounds)
        )
        assert found <= other + 1e-6


def test_free_groups_waste_nothing():
    lengths = np.array([1, 1, 4, 4, 4, 9])
    layout = GroupedLayout(lengths, CPU, Costs(group=0.0, token=1.0, pair=1.0))
    assert layout.is_packed
    assert layout.num_slots == layout.num_tokens == 23


def test_many_lengths_keep_waste_small():
    lengths = np.sort(np.random.default_rng(0).integers(1, 400, size=500))
    layout = GroupedLayout(lengths, CPU, Costs(group=0.0, token=1.0, pair=1.0))
    assert len(layout.groups) <= 24
    assert layout.num_slots < 1.1 * layout.num_tokens


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    causal=st.booleans(),
    group=st.sampled_from([0.0, 1e9]),
)
def test_attention_and_gradients_equal_those_of_each_sequence_alone(lengths, causal, group):
    lengths = np.sort(np.array(lengths))
    total, width, heads = int(lengths.sum()), 8, 2
    generator = torch.Generator().manual_seed(total)
    query, key_value, direction = (
        torch.randn(total, n, generator=generator) for n in (width, 2 * width, width)
    )
    layout = GroupedLayout(lengths, CPU, Costs(group=group, token=1.0, pair=1.0))
    inputs = [query.clone().requires_grad_(), key_value.clone().requires_grad_()]
    found = attend(*inputs, layout, num_heads=heads, dropout_rate=0.0, causal=causal)
    (found * direction).sum().backward()
    plain = [query.clone().requires_grad_(), key_value.clone().requires_grad_()]
    parts, begin = [], 0
    for length in lengths.tolist():
        rows = slice(begin, begin + length)
        q, k, v = (
            x.view(length, heads, -1).transpose(0, 1)
            for x in (plain[0][rows], plain[1][rows, :width], plain[1][rows, width:])
        )
        logits = q @ k.mT / (width // heads) ** 0.5
        if causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        parts.append((logits.softmax(-1) @ v).transpose(0, 1).reshape(length, width))
        begin += length
    expected = torch.cat(parts)
    (expected * direction).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(inputs, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
