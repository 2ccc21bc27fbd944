"""Draws: bits, distributions, and what the corrections promise."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kernels.alias import AliasTable
from kernels.linear_cross_entropy.api import linear_cross_entropy
from kernels.negatives import Negatives
from kernels.philox import philox4x32
from kernels.sampling import draw, make_plan

V = 101
NUM_DRAWS = 200_000


def expected(sampler, target):
    counts = torch.arange(1, V + 1).double()
    if sampler == "popularity":
        return counts / counts.sum()
    if sampler == "log_uniform":
        rank = torch.arange(V).double()
        return torch.log((rank + 2) / (rank + 1)) / math.log(V + 1)
    if sampler == "in_batch":
        valid = target[target >= 0]
        return torch.bincount(valid, minlength=V).double() / len(valid)
    return torch.full((V,), 1 / V, dtype=torch.float64)


def make(sampler, target, num=64, **options):
    if sampler == "popularity":
        options["item_counts"] = torch.arange(1, V + 1)
    negatives = Negatives(num, sampler=sampler, seed=11, **options)
    return make_plan(negatives, target, V)


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "log_uniform", "in_batch"])
def test_draws_follow_their_distribution(sampler):
    target = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(1))
    target[::7] = -1
    plan = make(sampler, target, hits="mask")
    ids, log_count = draw(plan, torch.arange(NUM_DRAWS // 64), None)
    seen = torch.bincount(ids.flatten(), minlength=V).numpy()
    wanted = (expected(sampler, target) * ids.numel()).numpy()
    assert (seen[wanted == 0] == 0).all()
    assert stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4
    if log_count is not None:
        truth = torch.log(expected(sampler, target))[ids]
        torch.testing.assert_close(log_count.double(), truth, rtol=1e-5, atol=1e-5)


def test_uniform_draws_leave_out_exactly_the_positive():
    rows = NUM_DRAWS // 64
    target = torch.arange(rows) % V
    ids, _ = draw(make("uniform", target), torch.arange(rows), target)
    assert not (ids == target[:, None]).any()
    offset = (ids - target[:, None]) % V
    seen = torch.bincount(offset.flatten(), minlength=V).numpy()[1:]
    assert stats.chisquare(seen).pvalue > 1e-4


def test_stratified_draws_take_one_per_stratum():
    target = torch.zeros(50, dtype=torch.int64)
    plan = make("uniform", target, num=10, stratified=True, share=50)
    ids, log_count = draw(plan, torch.arange(300), None)
    edges = torch.arange(11) * V // 10
    assert ((ids >= edges[:-1]) & (ids < edges[1:])).all()
    torch.testing.assert_close(log_count[0], -torch.log((edges[1:] - edges[:-1]).float()))
    ids, _ = draw(plan, torch.arange(20_000), None)
    stratum = ids[:, 9] - edges[9]
    assert stats.chisquare(torch.bincount(stratum, minlength=11).numpy()).pvalue > 1e-4


def test_log_uniform_in_large_catalogs():
    """Integer arithmetic keeps the tail that float32 would round away."""
    num_items = 9_400_000
    plan = make_plan(Negatives(64, sampler="log_uniform", seed=3, share=2), torch.zeros(
        4, dtype=torch.int64), num_items)  # fmt: skip
    ids, _ = draw(plan, torch.arange(4000), None)
    quantile = torch.log(ids.double() + 1.5) / math.log(num_items + 1)
    assert stats.kstest(quantile.flatten()[ids.flatten() > 100].numpy(), stats.uniform(
        loc=math.log(102) / math.log(num_items + 1),
        scale=1 - math.log(102) / math.log(num_items + 1)).cdf).pvalue > 1e-4  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 101, 1000])
def test_alias_table_draws_what_it_should(size, ties):
    counts = (torch.rand(size, generator=torch.Generator().manual_seed(size)) ** 6 * 100).round()
    counts[0] = 5
    if ties:  # running deficits that equal running excesses
        counts = torch.arange(1, size + 1)
    table = AliasTable.from_counts(counts)
    wanted = counts.double() / counts.double().sum()
    torch.testing.assert_close(table.probabilities(), wanted, rtol=1e-6, atol=1e-9)
    assert (table.probabilities()[counts == 0] == 0).all()


@pytest.mark.parametrize("seed", [42, 2**40 + 12345, 2**63 - 1])
def test_philox_has_tritons_bits(seed, device):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(Seed, Out, start, BLOCK: tl.constexpr):
        counter = start + tl.arange(0, BLOCK).to(tl.int64) * 715827883
        w0, w1, w2, w3 = tl.randint4x(tl.load(Seed), counter)
        lane = tl.arange(0, BLOCK)
        tl.store(Out + lane, w0.to(tl.uint32, bitcast=True).to(tl.int64))
        tl.store(Out + BLOCK + lane, w1.to(tl.uint32, bitcast=True).to(tl.int64))
        tl.store(Out + 2 * BLOCK + lane, w2.to(tl.uint32, bitcast=True).to(tl.int64))
        tl.store(Out + 3 * BLOCK + lane, w3.to(tl.uint32, bitcast=True).to(tl.int64))

    start, block = 2**33 + 5, 64
    out = torch.zeros(4, block, dtype=torch.int64, device=device)
    kernel[(1,)](torch.tensor(seed, device=device), out, start, BLOCK=block)
    counter = start + torch.arange(block) * 715827883
    assert torch.equal(out.cpu(), torch.stack(philox4x32(seed, counter)))


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "log_uniform", "in_batch"])
@pytest.mark.parametrize("share", [1, 32])
def test_triton_draws_the_same_items(sampler, share, device):
    """Gradients of one-hot embeddings show which items were drawn."""
    target = torch.arange(64) % V
    options = {"item_counts": torch.arange(1, V + 1)} if sampler == "popularity" else {}
    negatives = Negatives(16, sampler=sampler, share=share, seed=2**41 + 9, logq=False, **options)
    touched = []
    for impl in ("torch", "triton"):
        weight = torch.zeros(V, 16, device=device, requires_grad=True)
        e = torch.eye(64, 16, device=device) + 1
        linear_cross_entropy(
            e, weight, target.to(device), negatives=negatives, impl=impl, reduction="sum"
        ).backward()
        touched.append(weight.grad)
    # One other draw would move an entry by more than 1e-3.
    torch.testing.assert_close(touched[0], touched[1], rtol=0, atol=1e-5)


def partition(logq, hits, sampler, trials=3000, top=False):
    """Mean and standard error of the estimated sum over the negatives, and the truth."""
    generator = torch.Generator().manual_seed(4)
    e = torch.randn(1, 4, generator=generator)
    weight = torch.randn(V, 4, generator=generator)
    logits = (weight @ e[0]).double()
    positive = int(logits.argmax()) if top else 90
    target = torch.tensor([positive])
    options = {"item_counts": torch.arange(1, V + 1)} if sampler == "popularity" else {}
    negatives = Negatives(16, sampler=sampler, seed=8, logq=logq, hits=hits, **options)
    rows = e.expand(trials, -1)
    _, lse = linear_cross_entropy(
        rows, weight, target.expand(trials), negatives=negatives, return_lse=True, impl="torch"
    )
    estimate = lse.double().exp() - logits[positive].exp()
    truth = logits.exp().sum() - logits[positive].exp()
    return float(estimate.mean()), float(estimate.std() / math.sqrt(trials)), float(truth)


@pytest.mark.parametrize("sampler", ["uniform", "popularity", "log_uniform"])
@pytest.mark.parametrize(("logq", "hits"), [(True, "exclude"), (True, "mask"), ("refined", "mask")])
def test_partition_function_is_unbiased(sampler, logq, hits):
    mean, error, truth = partition(logq, hits, sampler)
    assert abs(mean - truth) < 4.5 * error


def test_counting_hits_as_negatives_is_biased():
    mean, error, truth = partition(True, "keep", "uniform", top=True)
    assert mean - truth > 5 * error


def test_refined_correction_is_the_gradient_of_the_published_loss():
    """Weighting -log(e^p / sum of negatives) by the detached 1 - P gives the same gradient."""
    generator = torch.Generator().manual_seed(6)
    e0, weight = torch.randn(20, 6, generator=generator), torch.randn(V, 6, generator=generator)
    target = torch.randint(V, (20,), generator=generator)
    counts = torch.arange(1, V + 1)
    negatives = Negatives(
        12, sampler="popularity", item_counts=counts, seed=5, logq="refined", hits="mask", share=20
    )
    e = e0.clone().requires_grad_()
    linear_cross_entropy(e, weight, target, negatives=negatives, reduction="sum").backward()

    other = e0.clone().requires_grad_()
    ids, _ = draw(make_plan(negatives, target, V), torch.zeros(1, dtype=torch.int64), None)
    q = counts.float() / counts.sum()
    logits = other @ weight[ids[0]].T - torch.log(q[ids[0]] / (1 - q[target][:, None]))
    hit = ids == target[:, None]
    logits = logits.masked_fill(hit, -torch.inf) - torch.log((~hit).sum(1, keepdim=True))
    positive = (other * weight[target]).sum(1)
    total = torch.logsumexp(logits, 1)
    p = torch.sigmoid(positive - total).detach()
    ((1 - p) * (total - positive)).sum().backward()
    torch.testing.assert_close(e.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [None, 1])
def test_unbiased_filter_keeps_the_expected_gradient(share):
    generator = torch.Generator().manual_seed(7)
    e0, weight = torch.randn(1, 6, generator=generator), torch.randn(60, 6, generator=generator)
    trials = 4000

    def gradients(eps, mode):
        negatives = None
        if share is not None:
            ids = torch.arange(1, 33)[None].repeat(trials, 1)
            negatives = Negatives(32, sampler=ids, logq=False, seed=5)
        e = e0.repeat(trials, 1).requires_grad_()
        torch.manual_seed(1)
        target = torch.zeros(trials, dtype=torch.int64)
        linear_cross_entropy(
            e, weight, target, negatives=negatives, filter_eps=eps, filter_mode=mode,
            reduction="sum", impl="torch",
        ).backward()  # fmt: skip
        return e.grad.double()

    exact = gradients(None, "drop")[0]
    kept = gradients(0.1, "unbiased")
    error = kept.std(0) / math.sqrt(trials)
    assert ((kept.mean(0) - exact).abs() < 4.5 * error + 1e-6).all()
    assert ((gradients(0.1, "drop")[0] - exact).abs() > 10 * error).any()


def test_equal_seeds_equal_negatives_new_seeds_new_ones():
    target = torch.zeros(8, dtype=torch.int64)
    sets = torch.arange(8)
    first = draw(make_plan(Negatives(16, seed=1), target, V), sets, target)[0]
    again = draw(make_plan(Negatives(16, seed=1), target, V), sets, target)[0]
    other = draw(make_plan(Negatives(16, seed=1).with_seed(2), target, V), sets, target)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(np.unique(first.numpy(), axis=0)) == 8
