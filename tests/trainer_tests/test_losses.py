import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from db.errors import SpecError
from db.spec import RunSpec
from trainer.losses import make_loss
from trainer.models.network import Predictions
from trainer.plain_losses import (
    binary_cross_entropy,
    cross_entropy,
    sampled_cross_entropy,
    uniform_others,
)

T, V, D = 50, 700, 8


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    return hidden, weight, bias, targets


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_materialised_ce_equals_torch(problem, weighted, biased, monkeypatch):
    # blocks of a few rows, the last one shorter
    monkeypatch.setattr("trainer.plain_losses._CELLS_CPU", 7 * V)
    hidden, weight, bias, targets = problem
    inputs = (hidden, weight, bias) if biased else (hidden, weight)
    counts = torch.randint(1, 9, (T,)).float() if weighted else None
    used = bias if biased else None
    found = cross_entropy(hidden, weight, targets, bias=used, target_weight=counts)
    each = F.cross_entropy(F.linear(hidden, weight, used), targets, reduction="none")
    expected = (each * counts).sum() / counts.sum() if weighted else each.mean()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        gradients(3 * found, *inputs), gradients(3 * expected, *inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_materialised_ce_holds_one_matrix_of_logits(problem):
    hidden, weight, _, targets = problem
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= T * V:
                sizes.append(out.untyped_storage().data_ptr())
            return out

    with Watch():
        cross_entropy(hidden, weight, targets).backward()
    assert len(set(sizes)) == 1


def test_materialised_ce_under_autocast_keeps_low_precision_logits(problem):
    hidden, weight, _, targets = problem
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(hidden @ weight.T, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    ours, theirs = gradients(loss, hidden)[0], gradients(expected, hidden)[0]
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_ce_minus_is_unbiased_for_the_partition_function(problem):
    """With every other item drawn once, the corrected sum is the whole partition function."""
    hidden, weight, bias, targets = problem
    others = torch.arange(V).expand(T, -1)
    found = sampled_cross_entropy(hidden, weight, targets, others, bias=bias)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(found, expected)


def test_ce_minus_with_nothing_but_hits_is_zero(problem):
    hidden, weight, _, targets = problem
    loss = sampled_cross_entropy(hidden, weight, targets, targets[:, None].expand(-1, 3))
    assert loss.item() == 0.0
    assert not gradients(loss, weight)[0].any()


def test_ce_minus_without_correction_is_plain_softmax_over_the_sample(problem):
    hidden, weight, _, targets = problem
    negatives = uniform_others(targets, 5, V, seed=1)
    found = sampled_cross_entropy(hidden, weight, targets, negatives, correction=False)
    items = torch.cat([targets[:, None], negatives], dim=1)
    logits = torch.einsum("td,tnd->tn", hidden, weight[items])
    expected = F.cross_entropy(logits, torch.zeros(T, dtype=torch.int64))
    torch.testing.assert_close(found, expected)


def test_bce_sums_over_negatives_and_is_finite_for_huge_logits(problem):
    hidden, weight, _, targets = problem
    negatives = uniform_others(targets, 4, V, seed=1)
    found = binary_cross_entropy(hidden, weight, targets, negatives)
    items = torch.cat([targets[:, None], negatives], dim=1)
    logits = torch.einsum("td,tnd->tn", hidden, weight[items])
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / T
    torch.testing.assert_close(found, expected)
    huge = binary_cross_entropy(hidden * 1e4, weight, targets, negatives)
    assert math.isfinite(huge.item())
    assert gradients(huge, hidden)[0].isfinite().all()


def test_uniform_others_cover_all_items_but_the_target():
    targets = torch.tensor([0, 3, 6]).repeat(4000)
    drawn = uniform_others(targets, 4, 7, seed=2)
    assert not (drawn == targets[:, None]).any()
    for target in (0, 3, 6):
        counts = torch.bincount(drawn[targets == target].flatten(), minlength=7)
        expected = 16000 / 6
        assert counts[target] == 0
        others = counts[counts > 0].double()
        assert len(others) == 6
        assert ((others - expected) / expected**0.5).abs().max() < 5


def make(problem, step=0, counts=None, **fields):
    hidden, weight, _, targets = problem
    spec = RunSpec(dataset="x", **fields)
    loss = make_loss(spec, V, counts)(Predictions(hidden, targets), weight, None, step)
    return loss, *gradients(loss, hidden, weight)


def assert_same(first, second, **tolerance):
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_cce_equals_ce(problem):
    assert_same(make(problem, loss="cce"), make(problem, loss="ce"), atol=1e-5, rtol=1e-4)


def test_cce_counts_padding_as_ce_does(problem):
    hidden, weight, _, targets = problem
    counted = Predictions(hidden, targets, torch.linspace(0, 40, T))
    found = [
        make_loss(RunSpec(dataset="x", loss=loss), V)(counted, weight, None, 0)
        for loss in ("ce", "cce")
    ]
    torch.testing.assert_close(*found)


def test_cce_minus_with_many_negatives_nears_ce(problem):
    full = make(problem, loss="ce")[0]
    draws = [
        make(problem, step=step, loss="cce_minus", num_negatives=V - 1)[0] for step in range(5)
    ]
    assert torch.stack(draws).mean().item() == pytest.approx(full.item(), rel=0.03)


def test_one_negative_of_bce_plus_is_bce(problem):
    """Same law, other draws: equal in the mean."""
    means = [
        np.mean([make(problem, step=s, loss=loss, num_negatives=1)[0].item() for s in range(150)])
        for loss in ("bce", "bce_plus")
    ]
    assert means[0] == pytest.approx(means[1], rel=0.05)


def test_gbce_without_calibration_is_mean_bce_plus(problem):
    plus = make(problem, loss="bce_plus", num_negatives=9)
    calibrated = make(problem, loss="gbce", num_negatives=9, gbce_t=0.0)
    assert_same([part / 10 for part in plus], calibrated)


@pytest.mark.parametrize("loss", ["ce_minus", "bce", "cce_minus", "bce_plus", "gbce", "sce"])
def test_draws_depend_on_seed_and_step_alone(problem, loss):
    fields = {"loss": loss}
    if loss != "sce":
        fields["num_negatives"] = 1 if loss == "bce" else 4
    first = make(problem, step=3, **fields)
    torch.manual_seed(99)
    assert_same(first, make(problem, step=3, **fields), atol=0, rtol=0)
    assert first[0] != make(problem, step=4, **fields)[0]
    assert first[0] != make(problem, step=3, seed=7, **fields)[0]


def test_item_biases_enter_every_loss(problem):
    hidden, weight, bias, targets = problem
    for loss in ("ce", "ce_minus", "bce", "cce", "cce_minus", "bce_plus", "gbce", "sce"):
        num = {"ce": None, "cce": None, "sce": None, "bce": 1}.get(loss, 6)
        function = make_loss(RunSpec(dataset="x", loss=loss, num_negatives=num), V)
        found = function(Predictions(hidden, targets), weight, bias, 0)
        (grad,) = gradients(found, bias)
        assert grad.abs().sum() > 0, loss


def test_samplers_by_popularity_need_counts_and_follow_them(problem):
    with pytest.raises(SpecError, match="negative_sampler='popularity' needs the item counts of"):
        make(problem, loss="cce_minus", num_negatives=4, negative_sampler="popularity")
    counts = torch.ones(V, dtype=torch.int64)
    counts[5] = 10**6
    for sampler in ("popularity", "log_uniform"):
        grad = make(
            problem, counts=counts, loss="bce_plus", num_negatives=40, negative_sampler=sampler
        )[2]
        assert grad.norm(dim=1).argmax() == 5, sampler


def test_too_many_negatives_are_refused(problem):
    with pytest.raises(SpecError, match=r"num_negatives=700 is not below the 700 items of 'x'"):
        make(problem, loss="ce_minus", num_negatives=700)
