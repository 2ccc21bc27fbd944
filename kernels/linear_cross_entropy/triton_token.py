"""Triton kernels for negatives that each token has for itself.

A program keeps some tokens and walks through their negatives, four draws to a random counter, so
that four gathers are in flight at a time. dE stays in registers; dC is the one thing that is added
atomically (fp32, relaxed), or in fixed point where equal bits are asked for.
"""

import triton
import triton.language as tl

from kernels.linear_cross_entropy.triton_device import (
    HITS_DROP,
    HITS_ZERO,
    KIND_ALIAS,
    KIND_IDS,
    NEVER,
    finish_log_sum_exp,
    load_rows,
    place,
    probability,
    sigmoid,
    softplus,
    to_logits,
)


@triton.jit
def draw_four(
    seed, sets, quad, positive, source, alias, log_q, pool_size, ok,
    num, range_size, log_range, inverse_log,
    KIND: tl.constexpr, STRATIFIED: tl.constexpr, SKIP: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    """Draws 4 quad .. 4 quad + 3 of each set: ids and log counts, four of each."""
    k = tl.zeros(sets.shape, tl.int32) + 4 * quad
    if KIND == KIND_IDS:
        base = source + sets * num
        i0 = tl.load(base + k, mask=ok, other=0)
        i1 = tl.load(base + k + 1, mask=ok & (k + 1 < num), other=0)
        i2 = tl.load(base + k + 2, mask=ok & (k + 2 < num), other=0)
        i3 = tl.load(base + k + 3, mask=ok & (k + 3 < num), other=0)
        q0 = tl.zeros(sets.shape, tl.float32)
        q1, q2, q3 = q0, q0, q0
        if CORRECTED:
            q0 = tl.load(log_q + i0, mask=ok, other=0.0)
            q1 = tl.load(log_q + i1, mask=ok, other=0.0)
            q2 = tl.load(log_q + i2, mask=ok, other=0.0)
            q3 = tl.load(log_q + i3, mask=ok, other=0.0)
    else:
        if KIND == KIND_ALIAS:
            counter = sets * ((num + 1) // 2) + 2 * quad
            w0, s0, w1, s1 = tl.randint4x(seed, counter)
            w2, s2, w3, s3 = tl.randint4x(seed, counter + 1)
        else:
            w0, w1, w2, w3 = tl.randint4x(seed, sets * ((num + 3) // 4) + quad)
            s0, s1, s2, s3 = w0, w1, w2, w3
        i0, q0 = place(
            w0.to(tl.uint32, bitcast=True), s0.to(tl.uint32, bitcast=True), k, positive,
            source, alias, log_q, pool_size, ok, num, range_size, log_range, inverse_log,
            KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        i1, q1 = place(
            w1.to(tl.uint32, bitcast=True), s1.to(tl.uint32, bitcast=True), k + 1, positive,
            source, alias, log_q, pool_size, ok, num, range_size, log_range, inverse_log,
            KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        i2, q2 = place(
            w2.to(tl.uint32, bitcast=True), s2.to(tl.uint32, bitcast=True), k + 2, positive,
            source, alias, log_q, pool_size, ok, num, range_size, log_range, inverse_log,
            KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        i3, q3 = place(
            w3.to(tl.uint32, bitcast=True), s3.to(tl.uint32, bitcast=True), k + 3, positive,
            source, alias, log_q, pool_size, ok, num, range_size, log_range, inverse_log,
            KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
    return i0, i1, i2, i3, q0, q1, q2, q3


@triton.jit
def score(
    e, C, B, ids, ok, d, width, stride_c, scale, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Embedding and logit of one negative per token."""
    c = load_rows(C, ids, ok, d, width, stride_c, UPCAST).to(tl.float32)
    dots = tl.sum(e * c, 1)
    if HAS_BIAS:
        dots += tl.load(B + ids, mask=ok, other=0.0).to(tl.float32)
    return c, to_logits(dots, scale, softcap, SOFTCAP)


@triton.jit
def weigh(logits, log_count, hit, ok, HITS: tl.constexpr, CORRECTED: tl.constexpr):
    """Corrected logit of a negative; -inf where it does not count."""
    if HITS == HITS_ZERO:
        logits = tl.where(hit, 0.0, logits)
    if CORRECTED:
        logits -= log_count
    if HITS == HITS_DROP:
        ok = ok & (hit == 0)
    return tl.where(ok, logits, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens", "num", "share", "range_size", "log_range"])
def forward_kernel(
    E, C, B, Y, Out, Positive, Hits, Seed, Source, Alias, LogQ, PoolSize,
    num_tokens, num, width, share, stride_e, stride_c, scale, softcap,
    range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr, STRATIFIED: tl.constexpr,
    SKIP: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (or sum of softplus) over each token's negatives, target logit, hits."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = rows < num_tokens
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    ok = row_ok & (target >= 0)
    d = tl.arange(0, BD)
    seed = tl.load(Seed)
    sets = (rows.to(tl.int32) // share).to(tl.int64)  # 64-bit division is a call, which spills
    e = load_rows(E, rows, ok, d, width, stride_e, UPCAST).to(tl.float32)
    _, positive = score(
        e, C, B, tl.maximum(target, 0), ok, d, width, stride_c, scale, softcap,
        HAS_BIAS, SOFTCAP, UPCAST,
    )  # fmt: skip
    top = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    hits = tl.zeros([BM], tl.float32)
    for quad in range(0, tl.cdiv(num, 4)):
        i0, i1, i2, i3, q0, q1, q2, q3 = draw_four(
            seed, sets, quad, target, Source, Alias, LogQ, PoolSize, ok, num, range_size,
            log_range, inverse_log, KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        ok1 = ok & (4 * quad + 1 < num)
        ok2 = ok & (4 * quad + 2 < num)
        ok3 = ok & (4 * quad + 3 < num)
        _, z0 = score(
            e, C, B, i0, ok, d, width, stride_c, scale, softcap, HAS_BIAS, SOFTCAP, UPCAST
        )
        _, z1 = score(
            e, C, B, i1, ok1, d, width, stride_c, scale, softcap, HAS_BIAS, SOFTCAP, UPCAST
        )
        _, z2 = score(
            e, C, B, i2, ok2, d, width, stride_c, scale, softcap, HAS_BIAS, SOFTCAP, UPCAST
        )
        _, z3 = score(
            e, C, B, i3, ok3, d, width, stride_c, scale, softcap, HAS_BIAS, SOFTCAP, UPCAST
        )
        hit0, hit1 = ok & (i0 == target), ok1 & (i1 == target)
        hit2, hit3 = ok2 & (i2 == target), ok3 & (i3 == target)
        if HITS != 0:
            hits += hit0.to(tl.float32) + hit1.to(tl.float32)
            hits += hit2.to(tl.float32) + hit3.to(tl.float32)
        if SIGMOID:
            if HITS == HITS_DROP:
                ok1 = ok1 & (hit1 == 0)
                ok2 = ok2 & (hit2 == 0)
                ok3 = ok3 & (hit3 == 0)
                total += tl.where(ok & (hit0 == 0), softplus(z0), 0.0)
            else:
                total += tl.where(ok, softplus(z0), 0.0)
            total += tl.where(ok1, softplus(z1), 0.0) + tl.where(ok2, softplus(z2), 0.0)
            total += tl.where(ok3, softplus(z3), 0.0)
        else:
            z0 = weigh(z0, q0, hit0, ok, HITS, CORRECTED)
            z1 = weigh(z1, q1, hit1, ok1, HITS, CORRECTED)
            z2 = weigh(z2, q2, hit2, ok2, HITS, CORRECTED)
            z3 = weigh(z3, q3, hit3, ok3, HITS, CORRECTED)
            new_top = tl.maximum(tl.maximum(top, tl.maximum(z0, z1)), tl.maximum(z2, z3))
            total = total * tl.exp(top - new_top) + tl.exp(z0 - new_top) + tl.exp(z1 - new_top)
            total += tl.exp(z2 - new_top) + tl.exp(z3 - new_top)
            top = new_top
    out = total if SIGMOID else finish_log_sum_exp(top, total)
    tl.store(Out + rows, out, mask=row_ok)
    tl.store(Positive + rows, positive, mask=row_ok)
    if HITS != 0:
        tl.store(Hits + rows, hits, mask=row_ok)


@triton.jit
def add_row(Out, OutBias, ids, grad, e, ok, d, width, unit, HAS_BIAS: tl.constexpr,
            SPARSE: tl.constexpr):  # fmt: skip
    """Add each token's grad * e to a row of dC."""
    if SPARSE:  # rows whose entry was filtered cost no traffic
        ok = ok & (grad != 0.0)
    mask = ok[:, None] & (d < width)[None, :]
    value = (grad * unit)[:, None] * e
    cell = Out + ids[:, None] * width + d[None, :]
    tl.atomic_add(cell, value.to(Out.dtype.element_ty), mask=mask, sem="relaxed")
    if HAS_BIAS:
        value = (grad * unit).to(OutBias.dtype.element_ty)
        tl.atomic_add(OutBias + ids, value, mask=ok, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "num", "share", "range_size", "log_range"])
def backward_kernel(
    E, C, B, Y, Base, GradBase, GradTarget, Share, Positive, ScaleE, ScaleC, OutE, OutC, OutBias,
    Seed, Source, Alias, LogQ, PoolSize, FilterSeed,
    num_tokens, num, width, share, stride_e, stride_c, scale, softcap, eps,
    range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KIND: tl.constexpr, STRATIFIED: tl.constexpr,
    SKIP: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr,
    FILTER: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Own dE of some tokens in registers; add their rows of dC atomically, four at a time."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = rows < num_tokens
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    ok = row_ok & (target >= 0)
    d = tl.arange(0, BD)
    seed = tl.load(Seed)
    sets = (rows.to(tl.int32) // share).to(tl.int64)  # 64-bit division is a call, which spills
    filter_seed = tl.load(FilterSeed)
    unit = tl.load(ScaleC)
    e = load_rows(E, rows, ok, d, width, stride_e, UPCAST).to(tl.float32)
    base = tl.load(Base + rows, mask=ok, other=0.0)
    grad_base = tl.load(GradBase + rows, mask=ok, other=0.0)
    part = tl.load(Share + rows, mask=ok, other=1.0)
    safe = tl.maximum(target, 0)
    c = load_rows(C, safe, ok, d, width, stride_c, UPCAST).to(tl.float32)
    grad = tl.load(GradTarget + rows, mask=ok, other=0.0)
    if SOFTCAP:
        positive = tl.load(Positive + rows, mask=ok, other=0.0)
        grad *= 1.0 - (positive / softcap) * (positive / softcap)
    acc = grad[:, None] * c
    add_row(OutC, OutBias, safe, grad, e, ok, d, width, unit, HAS_BIAS, False)
    for quad in range(0, tl.cdiv(num, 4)):
        i0, i1, i2, i3, q0, q1, q2, q3 = draw_four(
            seed, sets, quad, target, Source, Alias, LogQ, PoolSize, ok, num, range_size,
            log_range, inverse_log, KIND, STRATIFIED, SKIP, CORRECTED,
        )  # fmt: skip
        u0, u1, u2, u3 = base, base, base, base
        if FILTER == 2:
            counter = rows * ((num + 3) // 4) + quad
            w0, w1, w2, w3 = tl.randint4x(filter_seed, counter)
            u0, u1 = to_uniform(w0), to_uniform(w1)
            u2, u3 = to_uniform(w2), to_uniform(w3)
        # Loads do not pass atomics: all four gathers start before the first of them.
        c0 = load_rows(C, i0, ok, d, width, stride_c, UPCAST)
        c1 = load_rows(C, i1, ok & (4 * quad + 1 < num), d, width, stride_c, UPCAST)
        c2 = load_rows(C, i2, ok & (4 * quad + 2 < num), d, width, stride_c, UPCAST)
        c3 = load_rows(C, i3, ok & (4 * quad + 3 < num), d, width, stride_c, UPCAST)
        for lane in tl.static_range(4):
            if lane == 0:
                ids, log_count, uniform, c = i0, q0, u0, c0
            elif lane == 1:
                ids, log_count, uniform, c = i1, q1, u1, c1
            elif lane == 2:
                ids, log_count, uniform, c = i2, q2, u2, c2
            else:
                ids, log_count, uniform, c = i3, q3, u3, c3
            here = ok & (4 * quad + lane < num)
            c = c.to(tl.float32)
            dots = tl.sum(e * c, 1)
            if HAS_BIAS:
                dots += tl.load(B + ids, mask=here, other=0.0).to(tl.float32)
            z = to_logits(dots, scale, softcap, SOFTCAP)
            hit = ids == target
            if SIGMOID:
                p = sigmoid(z)
            else:
                value = z
                if CORRECTED:
                    value -= log_count
                p = probability(value, base)
                if FILTER > 0:
                    p *= part
                    if FILTER == 1:
                        p = tl.where(p < eps, 0.0, p)
                    else:
                        p = tl.where(p < eps, tl.where(uniform * eps < p, eps, 0.0), p)
                    p /= part
            if HITS != 0:
                p = tl.where(hit, 0.0, p)
            grad = tl.where(here, p * grad_base, 0.0)
            if SOFTCAP:
                grad *= 1.0 - (z / softcap) * (z / softcap)
            acc += grad[:, None] * c
            add_row(OutC, OutBias, ids, grad, e, here, d, width, unit, HAS_BIAS, FILTER > 0)
    tl.store(
        OutE + rows[:, None] * width + d[None, :],
        (acc * tl.load(ScaleE)).to(OutE.dtype.element_ty),
        mask=row_ok[:, None] & (d < width)[None, :],
    )


@triton.jit
def to_uniform(word):
    """Number in [0, 1) of 24 bits."""
    return (word.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604645e-08


@triton.jit(do_not_specialize=["num_tokens"])
def positive_kernel(
    E, C, B, Y, Out, num_tokens, width, stride_e, stride_c, scale, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    NUM_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logit of each token's target."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = rows < num_tokens
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    ok = row_ok & (target >= 0)
    safe = tl.maximum(target, 0)
    dots = tl.zeros([BM], tl.float32)
    for part in tl.static_range(NUM_D):
        d = part * BD + tl.arange(0, BD)
        e = load_rows(E, rows, ok, d, width, stride_e, UPCAST).to(tl.float32)
        c = load_rows(C, safe, ok, d, width, stride_c, UPCAST).to(tl.float32)
        dots += tl.sum(e * c, 1)
    if HAS_BIAS:
        dots += tl.load(B + safe, mask=ok, other=0.0).to(tl.float32)
    tl.store(Out + rows, to_logits(dots, scale, softcap, SOFTCAP), mask=row_ok)


@triton.jit(do_not_specialize=["num_tokens"])
def positive_grad_c_kernel(
    E, Y, GradTarget, Positive, OutC, OutBias, num_tokens, width, stride_e, softcap, ScaleC,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the gradient of each token's target logit to dC."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row_ok = rows < num_tokens
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    ok = row_ok & (target >= 0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    e = load_rows(E, rows, ok, d, width, stride_e, UPCAST).to(tl.float32)
    grad = tl.load(GradTarget + rows, mask=ok, other=0.0)
    if SOFTCAP:
        positive = tl.load(Positive + rows, mask=ok, other=0.0)
        grad *= 1.0 - (positive / softcap) * (positive / softcap)
    unit = tl.load(ScaleC)
    add_row(OutC, OutBias, tl.maximum(target, 0), grad, e, ok, d, width, unit, False, False)
    if HAS_BIAS and tl.program_id(1) == 0:
        value = (grad * unit).to(OutBias.dtype.element_ty)
        tl.atomic_add(OutBias + tl.maximum(target, 0), value, mask=ok, sem="relaxed")
