"""Draws and addresses past 32 bits: device functions against torch, and rows far apart."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.linear_cross_entropy import triton_device, triton_token
from kernels.linear_cross_entropy.api import linear_cross_entropy
from kernels.linear_cross_entropy.triton_sampled import _draws, _ranges
from kernels.negatives import Negatives
from kernels.sampling import IDS, draw, make_plan

SETS = [0, 1, 5, 2**31 // 14 + 3, 2**33]


@triton.jit
def draws_of_tiles(
    Out, Count, Sets, Seed, Source, Alias, LogQ, PoolSize, num, range_size, log_range, inverse_log,
    KIND: tl.constexpr, STRATIFIED: tl.constexpr, CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    ids, count = triton_device.draw_set(
        tl.load(Seed), tl.load(Sets + tl.program_id(0)), k, Source, Alias, LogQ, PoolSize,
        num, range_size, log_range, inverse_log, KIND, STRATIFIED, CORRECTED,
    )  # fmt: skip
    tl.store(Out + tl.program_id(0) * num + k, ids, mask=k < num)
    tl.store(Count + tl.program_id(0) * num + k, count, mask=k < num)


@triton.jit
def draws_of_tokens(
    Out, Count, Sets, Target, Seed, Source, Alias, LogQ, PoolSize, num, range_size, log_range,
    inverse_log, num_sets, KIND: tl.constexpr, STRATIFIED: tl.constexpr, SKIP: tl.constexpr,
    CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    ok = lane < num_sets
    sets = tl.load(Sets + lane, mask=ok, other=0)
    positive = tl.load(Target + lane, mask=ok, other=0)
    for quad in range(0, tl.cdiv(num, 4)):
        i0, i1, i2, i3, q0, q1, q2, q3 = triton_token.draw_four(
            tl.load(Seed), sets, quad, positive, Source, Alias, LogQ, PoolSize, ok, num,
            range_size, log_range, inverse_log, KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        place = lane * num + 4 * quad
        tl.store(Out + place, i0, mask=ok)
        tl.store(Out + place + 1, i1, mask=ok & (4 * quad + 1 < num))
        tl.store(Out + place + 2, i2, mask=ok & (4 * quad + 2 < num))
        tl.store(Out + place + 3, i3, mask=ok & (4 * quad + 3 < num))
        tl.store(Count + place, q0, mask=ok)
        tl.store(Count + place + 1, q1, mask=ok & (4 * quad + 1 < num))
        tl.store(Count + place + 2, q2, mask=ok & (4 * quad + 2 < num))
        tl.store(Count + place + 3, q3, mask=ok & (4 * quad + 3 < num))


def drawn_by_triton(plan, sets, target):
    """Ids and log counts by the tile kernels' device function, and by the token kernels'."""
    flags = {"KIND": plan.kind, "STRATIFIED": plan.stratified, "CORRECTED": plan.corrected}
    ids = torch.full((2, len(sets), plan.num), -1, dtype=torch.int64, device=sets.device)
    count = torch.full(ids.shape, torch.nan, device=sets.device)
    if not plan.skip_positive:
        draws_of_tiles[(len(sets),)](
            ids[0], count[0], sets, *_draws(plan), plan.num, *_ranges(plan), BLOCK=64, **flags
        )
    draws_of_tokens[(1,)](
        ids[1], count[1], sets, target, *_draws(plan), plan.num, *_ranges(plan), len(sets),
        SKIP=plan.skip_positive, BLOCK=16, **flags,
    )  # fmt: skip
    return [(ids[1], count[1])] if plan.skip_positive else list(zip(ids, count, strict=True))


@pytest.mark.parametrize("num_items", [97, 9_400_000])
@pytest.mark.parametrize(
    "sampler", ["uniform", "skip", "stratified", "popularity", "log_uniform", "in_batch"]
)
def test_every_sampler_draws_torchs_bits(sampler, num_items, device):
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(num_items, (len(SETS),), generator=generator).to(device)
    options = {"sampler": "uniform" if sampler in ("skip", "stratified") else sampler}
    if sampler == "popularity":
        counts = torch.rand(num_items, generator=generator) ** 4
        options["item_counts"] = counts.to(device)
    if sampler == "log_uniform":
        options["ranking"] = torch.randperm(num_items, generator=generator).to(device)
    hits = "exclude" if sampler == "skip" else "mask"
    negatives = Negatives(
        14, hits=hits, stratified=sampler == "stratified", seed=2**62 + 11, **options
    )
    plan = make_plan(negatives, target, num_items)
    sets = torch.tensor(SETS, device=device)
    ids, log_count = draw(plan, sets, target)
    for made, counted in drawn_by_triton(plan, sets, target):
        assert torch.equal(made, ids)
        if log_count is not None:
            torch.testing.assert_close(counted, log_count, rtol=1e-5, atol=1e-5)


def far_memory(size, dtype, device, path):
    """Elements that take memory only where they are touched (on a GPU, all of it)."""
    if device == "cuda":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def test_ids_drawn_elsewhere_may_pass_two_billion(device, tmp_path):
    num, last = 64, 2**25 + 2
    ids = far_memory((last + 1) * num, torch.int64, device, tmp_path / "ids").view(-1, num)
    sets = torch.tensor([0, last - 1, last], device=device)
    ids[sets] = torch.arange(3 * num, device=device).view(3, num)
    plan = make_plan(Negatives(num, sampler=ids, logq=False), sets, 500)
    assert plan.kind == IDS
    for made, _ in drawn_by_triton(plan, sets, sets):
        assert torch.equal(made, ids[sets])


@pytest.mark.parametrize("share", [None, 1, 32])
@pytest.mark.parametrize(("num_rows", "stride"), [(4, 2**30), (530, 2**22)])
def test_rows_may_lie_far_apart(num_rows, stride, share, device, tmp_path):
    """Row times stride passes 2**31 for e and for weight; a 32-bit product would read elsewhere."""
    width = 16
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(num_rows, (num_rows,), generator=generator).to(device)
    near, far = [], []
    for name in ("e", "weight"):
        rows = torch.randn(num_rows, width, generator=generator).to(device, torch.float16)
        memory = far_memory((num_rows - 1) * stride + width, rows.dtype, device, tmp_path / name)
        apart = memory.as_strided((num_rows, width), (stride, 1))
        apart.copy_(rows)
        near.append(rows.requires_grad_())
        far.append(apart.requires_grad_())
    negatives = None if share is None else Negatives(2, share=share, seed=1)
    for e, weight in (near, far):
        loss = linear_cross_entropy(e, weight, target, negatives=negatives, impl="triton")
        loss.backward(torch.full_like(loss, num_rows))
    for a, b in zip(near, far, strict=True):
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


def last_losses(num_tokens, num, impl, device):
    """Losses of the last tokens of a batch, and what their own draws say they are."""
    num_items, width, last = 1000, 16, 4
    generator = torch.Generator(device).manual_seed(1)
    e = torch.randn(num_tokens, width, device=device, generator=generator)
    weight = torch.randn(num_items, width, device=device, generator=generator)
    target = torch.randint(num_items, (num_tokens,), device=device, generator=generator)
    negatives = Negatives(num, seed=5)
    made = linear_cross_entropy(
        e, weight, target, negatives=negatives, reduction="none", impl=impl
    )[-last:]
    sets = torch.arange(num_tokens - last, num_tokens, device=device)
    plan = make_plan(negatives, target, num_items)
    ids, _ = draw(plan, sets, target[sets])
    logits = torch.einsum("nd,nkd->nk", e[sets].double(), weight[ids].double())
    positive = (e[sets] * weight[target[sets]]).double().sum(1)
    negative = torch.logsumexp(logits, 1) + plan.base_shift
    return made, torch.logaddexp(negative, positive) - positive


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_last_tokens_have_their_own_draws(impl, device):
    made, wanted = last_losses(200, 64, impl, device)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_more_than_two_billion_draws(cuda):
    made, wanted = last_losses(2**21 + 70, 999, "triton", cuda)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-4)
