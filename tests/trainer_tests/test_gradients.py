import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.gradients import (
    SMALLEST_FP16,
    count_by_size,
    gradient_histograms,
    histogram_edges,
)


def test_bins_count_from_edge_to_next_edge():
    edges = (0.0, 1.0, 10.0, 100.0)
    values = torch.tensor([0.0, 0.5, -1.0, 9.99, 10.0, 1e9, math.inf, -math.nan])
    assert count_by_size(values, edges).tolist() == [2, 2, 4]


@pytest.mark.parametrize("edge", [0.1, SMALLEST_FP16, 3e-5])
def test_float32_values_fall_on_the_right_side_of_an_edge(edge):
    nearest = torch.tensor(edge)
    values = torch.stack(
        [
            torch.nextafter(nearest, torch.tensor(0.0)),
            nearest,
            torch.nextafter(nearest, torch.tensor(9.0)),
        ]
    )
    below = int((values.double() < edge).sum())
    assert count_by_size(values, (0.0, edge, 1e6)).tolist() == [below, 3 - below]


def test_edges_hold_what_shares_are_asked_below():
    edges = histogram_edges(filter_eps=0.0123)
    assert list(edges) == sorted(set(edges))
    assert edges[0] == 0.0
    assert {SMALLEST_FP16, 0.0123} <= set(edges)


def test_histograms_are_those_of_the_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator)
    weight = torch.randn(90, 8, generator=generator).requires_grad_()
    targets = torch.randint(90, (40,), generator=generator)
    logits = (hidden @ weight.T).detach().requires_grad_()
    F.cross_entropy(logits, targets, reduction="sum").backward()
    F.cross_entropy(hidden @ weight.T, targets).backward()
    found = gradient_histograms(7, hidden, weight.detach(), targets, weight.grad)
    assert [(r.step, r.name) for r in found] == [(7, "logit_gradient"), (7, "item_gradient")]
    for record, values in zip(found, (logits.grad, weight.grad), strict=True):
        expected, _ = np.histogram(values.abs().double().numpy(), bins=record.edges)
        assert sum(record.counts) == values.numel()
        assert np.abs(np.array(record.counts) - expected).sum() <= 4, "but for rounding at an edge"


def test_at_most_256_tokens_are_looked_at():
    hidden, weight = torch.randn(1000, 4), torch.randn(10, 4)
    (record,) = gradient_histograms(0, hidden, weight, torch.zeros(1000, dtype=torch.int64), None)
    assert sum(record.counts) == 2560
