"""Triton kernels over tiles of logits: the full softmax, and negatives shared by blocks of tokens.

Tokens are rows, items (or the negatives of a set) are columns. Three kernels: the forward pass
keeps a running log-sum-exp per row; one backward pass owns dE tiles and one owns dC tiles, each in
registers, so there are no locks, and the full softmax has no atomics and is deterministic.
"""

import triton
import triton.language as tl

from kernels.linear_cross_entropy.triton_device import (
    HITS_DROP,
    HITS_ZERO,
    NEVER,
    draw_set,
    filter_tile,
    finish_log_sum_exp,
    load_rows,
    softplus,
    to_logits,
)


@triton.jit
def columns_of_tile(
    first, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns,
    range_size, log_range, inverse_log,
    SAMPLED: tl.constexpr, KIND: tl.constexpr, STRATIFIED: tl.constexpr, CORRECTED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Item ids, log counts and validity of columns first, first + 1, ..."""
    k = first + tl.arange(0, BN)
    if SAMPLED:
        ids, log_count = draw_set(
            seed, set_number, k, Source, Alias, LogQ, PoolSize, num_columns, range_size,
            log_range, inverse_log, KIND, STRATIFIED, CORRECTED,
        )  # fmt: skip
    else:
        ids = k
        log_count = tl.zeros([BN], tl.float32)
    return ids, log_count, k < num_columns


@triton.jit
def dots_of_tile(
    E, C, B, e_tile, c_tile, rows, row_ok, ids, column_ok, width, stride_e, stride_c,
    HAS_BIAS: tl.constexpr, HAVE_E: tl.constexpr, HAVE_C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, NUM_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products (plus bias) of a tile, float32; operands given where they fit as a whole."""
    dots = tl.zeros([BM, BN], tl.float32)
    for part in tl.static_range(NUM_D):
        d = part * BD + tl.arange(0, BD)
        if HAVE_E:
            e = e_tile
        else:
            e = load_rows(E, rows, row_ok, d, width, stride_e, UPCAST)
        if HAVE_C:
            c = c_tile
        else:
            c = load_rows(C, ids, column_ok, d, width, stride_c, UPCAST)
        dots = tl.dot(e, tl.trans(c), dots, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(B + ids, mask=column_ok, other=0.0).to(tl.float32)
        dots += bias[None, :]
    return dots


@triton.jit(
    do_not_specialize=["num_tokens", "num_columns", "share", "columns_per_split", "range_size", "log_range"]
)
def forward_kernel(
    E, C, B, Y, Out, Extra, Seed, Source, Alias, LogQ, PoolSize,
    num_tokens, num_columns, width, share, columns_per_split, stride_e, stride_c,
    scale, softcap, range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, KIND: tl.constexpr,
    STRATIFIED: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr,
    EXTRA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    NUM_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (or sum of softplus) of each row over one split of the columns.

    Extra is the sum of logits (EXTRA 1) or the number of hits (EXTRA 2) of each row.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    tiles_per_set = tl.cdiv(share, BM)
    set_number = tile // tiles_per_set
    rows = set_number * share + (tile % tiles_per_set) * BM + tl.arange(0, BM)
    row_ok = rows < tl.minimum((set_number + 1) * share, num_tokens)
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    seed = tl.load(Seed)
    e_tile = load_rows(E, rows, row_ok & (target >= 0), tl.arange(0, BD), width, stride_e, UPCAST)
    top = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    extra = tl.zeros([BM], tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, num_columns)
    for start in range(first, last, BN):
        ids, log_count, column_ok = columns_of_tile(
            start, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, range_size,
            log_range, inverse_log, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
        )  # fmt: skip
        dots = dots_of_tile(
            E, C, B, e_tile, e_tile, rows, row_ok, ids, column_ok, width, stride_e, stride_c,
            HAS_BIAS, NUM_D == 1, False, BM, BN, BD, NUM_D, UPCAST, PRECISION,
        )  # fmt: skip
        logits = to_logits(dots, scale, softcap, SOFTCAP)
        if EXTRA == 1:
            extra += tl.sum(tl.where(column_ok[None, :], logits, 0.0), 1)
        hit = column_ok[None, :] & (ids[None, :] == target[:, None])
        if EXTRA == 2:
            extra += tl.sum(hit.to(tl.float32), 1)
        if SIGMOID:
            value = softplus(logits)
            if HITS == HITS_DROP:
                value = tl.where(hit, 0.0, value)
            total += tl.sum(tl.where(column_ok[None, :], value, 0.0), 1)
        else:
            if SAMPLED:
                if HITS == HITS_ZERO:
                    logits = tl.where(hit, 0.0, logits)
                if CORRECTED:
                    logits -= log_count[None, :]
                if HITS == HITS_DROP:
                    logits = tl.where(hit, float("-inf"), logits)
            logits = tl.where(column_ok[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
            top = new_top
    out = total if SIGMOID else finish_log_sum_exp(top, total)
    tl.store(Out + split * num_tokens + rows, out, mask=row_ok)
    if EXTRA > 0:
        tl.store(Extra + split * num_tokens + rows, extra, mask=row_ok)


@triton.jit
def gradient_of_tile(
    dots, rows, row_ok, target, ids, log_count, column_ok, first, Base, GradBase, GradTarget,
    GradMean, Share, filter_seed, num_columns, scale, softcap, eps,
    SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_MEAN: tl.constexpr, FILTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss with respect to dot product / scale, from normalised upstream ones."""
    logits = to_logits(dots, scale, softcap, SOFTCAP)
    grad_base = tl.load(GradBase + rows, mask=row_ok, other=0.0)
    hit = ids[None, :] == target[:, None]
    if SIGMOID:
        p = 1.0 / (1.0 + tl.exp(-logits))
        if HITS == HITS_DROP:
            p = tl.where(hit, 0.0, p)
    else:
        base = tl.load(Base + rows, mask=row_ok, other=0.0)
        value = logits
        if SAMPLED and CORRECTED:
            value -= log_count[None, :]
        p = tl.exp(value - base[:, None])
        if SAMPLED and HITS != 0:
            p = tl.where(hit, 0.0, p)
        if FILTER > 0:
            if SAMPLED:
                part = tl.load(Share + rows, mask=row_ok, other=1.0)
                p = filter_tile(
                    p * part[:, None], filter_seed, rows, first, num_columns, eps, FILTER, BM, BN
                )
                p = p / part[:, None]
            else:
                p = filter_tile(p, filter_seed, rows, first, num_columns, eps, FILTER, BM, BN)
    grad = p * grad_base[:, None]
    if HAS_MEAN:
        grad += tl.load(GradMean + rows, mask=row_ok, other=0.0)[:, None]
    if not SAMPLED:
        grad_target = tl.load(GradTarget + rows, mask=row_ok, other=0.0)
        grad += tl.where(hit, grad_target[:, None], 0.0)
    if SOFTCAP:
        grad *= 1.0 - (logits / softcap) * (logits / softcap)
    keep = column_ok[None, :] & (row_ok & (target >= 0))[:, None]
    return tl.where(keep, grad, 0.0)


@triton.jit(
    do_not_specialize=["num_tokens", "num_columns", "share", "columns_per_split", "range_size", "log_range"]
)
def grad_e_kernel(
    E, C, B, Y, Base, GradBase, GradTarget, GradMean, Share, Positive, Scale, Out,
    Seed, Source, Alias, LogQ, PoolSize, FilterSeed,
    num_tokens, num_columns, width, share, columns_per_split, stride_e, stride_c,
    scale, softcap, eps, range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, KIND: tl.constexpr,
    STRATIFIED: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_MEAN: tl.constexpr, FILTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, NUM_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE of a tile of rows and a part of the width, over one split of the columns."""
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    tiles_per_set = tl.cdiv(share, BM)
    set_number = tile // tiles_per_set
    rows = set_number * share + (tile % tiles_per_set) * BM + tl.arange(0, BM)
    row_ok = rows < tl.minimum((set_number + 1) * share, num_tokens)
    target = tl.load(Y + rows, mask=row_ok, other=-1)
    seed = tl.load(Seed)
    filter_seed = tl.load(FilterSeed)
    d = part * BD + tl.arange(0, BD)
    e_tile = load_rows(E, rows, row_ok & (target >= 0), d, width, stride_e, UPCAST)
    acc = tl.zeros([BM, BD], tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, num_columns)
    for start in range(first, last, BN):
        ids, log_count, column_ok = columns_of_tile(
            start, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, range_size,
            log_range, inverse_log, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
        )  # fmt: skip
        c_tile = load_rows(C, ids, column_ok, d, width, stride_c, UPCAST)
        dots = dots_of_tile(
            E, C, B, e_tile, c_tile, rows, row_ok, ids, column_ok, width, stride_e, stride_c,
            HAS_BIAS, NUM_D == 1, NUM_D == 1, BM, BN, BD, NUM_D, UPCAST, PRECISION,
        )  # fmt: skip
        grad = gradient_of_tile(
            dots, rows, row_ok, target, ids, log_count, column_ok, start, Base, GradBase,
            GradTarget, GradMean, Share, filter_seed, num_columns, scale, softcap, eps,
            SOFTCAP, SAMPLED, HITS, CORRECTED, SIGMOID, HAS_MEAN, FILTER, BM, BN,
        )  # fmt: skip
        if FILTER > 0:
            if tl.max(tl.max(tl.abs(grad), 1), 0) > 0.0:
                acc = tl.dot(grad.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(grad.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
    if SAMPLED and split == 0:
        # The full softmax meets its targets among the columns; sampled ones are added here.
        grad = tl.load(GradTarget + rows, mask=row_ok & (target >= 0), other=0.0)
        if SOFTCAP:
            positive = tl.load(Positive + rows, mask=row_ok, other=0.0)
            grad *= 1.0 - (positive / softcap) * (positive / softcap)
        acc += grad[:, None] * load_rows(
            C, tl.maximum(target, 0), row_ok, d, width, stride_c, UPCAST
        ).to(tl.float32)
    tl.store(
        Out + (split * num_tokens + rows[:, None]) * width + d[None, :],
        (acc * tl.load(Scale)).to(Out.dtype.element_ty),
        mask=row_ok[:, None] & (d < width)[None, :],
    )


@triton.jit(
    do_not_specialize=["num_tokens", "num_columns", "share", "rows_per_split", "range_size", "log_range"]
)
def grad_c_kernel(
    E, C, B, Y, Base, GradBase, GradTarget, GradMean, Share, Scale, Out, OutBias,
    Seed, Source, Alias, LogQ, PoolSize, FilterSeed,
    num_tokens, num_columns, width, share, rows_per_split, stride_e, stride_c,
    scale, softcap, eps, range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, KIND: tl.constexpr,
    STRATIFIED: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_MEAN: tl.constexpr, FILTER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, NUM_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC (and db) of a tile of columns and a part of the width, over one split of a set's rows.

    The full softmax owns its rows of dC and stores them; negatives are added atomically, in
    fixed point where Out holds integers, which no order of additions can change.
    """
    column_tiles = tl.cdiv(num_columns, BN)
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    set_number = tile // column_tiles
    first = (tile % column_tiles) * BN
    seed = tl.load(Seed)
    filter_seed = tl.load(FilterSeed)
    ids, log_count, column_ok = columns_of_tile(
        first, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, range_size,
        log_range, inverse_log, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
    )  # fmt: skip
    d = part * BD + tl.arange(0, BD)
    c_tile = load_rows(C, ids, column_ok, d, width, stride_c, UPCAST)
    acc = tl.zeros([BN, BD], tl.float32)
    acc_bias = tl.zeros([BN], tl.float32)
    begin = set_number * share + split * rows_per_split
    end = tl.minimum(tl.minimum(begin + rows_per_split, (set_number + 1) * share), num_tokens)
    for start in range(begin, end, BM):
        rows = start + tl.arange(0, BM)
        row_ok = rows < end
        target = tl.load(Y + rows, mask=row_ok, other=-1)
        row_ok = row_ok & (target >= 0)
        e_tile = load_rows(E, rows, row_ok, d, width, stride_e, UPCAST)
        dots = dots_of_tile(
            E, C, B, e_tile, c_tile, rows, row_ok, ids, column_ok, width, stride_e, stride_c,
            HAS_BIAS, NUM_D == 1, NUM_D == 1, BM, BN, BD, NUM_D, UPCAST, PRECISION,
        )  # fmt: skip
        grad = gradient_of_tile(
            dots, rows, row_ok, target, ids, log_count, column_ok, first, Base, GradBase,
            GradTarget, GradMean, Share, filter_seed, num_columns, scale, softcap, eps,
            SOFTCAP, SAMPLED, HITS, CORRECTED, SIGMOID, HAS_MEAN, FILTER, BM, BN,
        )  # fmt: skip
        if HAS_BIAS:
            acc_bias += tl.sum(grad, 0)
        grad = tl.trans(grad.to(e_tile.dtype))
        if FILTER > 0:
            if tl.max(tl.max(tl.abs(grad), 1), 0) > 0.0:
                acc = tl.dot(grad, e_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(grad, e_tile, acc, input_precision=PRECISION)
    acc *= tl.load(Scale)
    acc_bias *= tl.load(Scale)
    inside = column_ok[:, None] & (d < width)[None, :]
    if SAMPLED:
        place = Out + ids[:, None] * width + d[None, :]
        tl.atomic_add(place, acc.to(Out.dtype.element_ty), mask=inside, sem="relaxed")
        if HAS_BIAS and part == 0:
            value = acc_bias.to(OutBias.dtype.element_ty)
            tl.atomic_add(OutBias + ids, value, mask=column_ok, sem="relaxed")
    else:
        place = Out + (split * num_columns + ids[:, None]) * width + d[None, :]
        tl.store(place, acc.to(Out.dtype.element_ty), mask=inside)
        if HAS_BIAS and part == 0:
            tl.store(OutBias + split * num_columns + ids, acc_bias, mask=column_ok)
