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
    probability,
    sigmoid,
    softplus,
    to_logits,
)


@triton.jit
def columns_of_tile(
    C, B, first, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, stride_c,
    range_size, log_range, inverse_log,
    HAS_BIAS: tl.constexpr, SAMPLED: tl.constexpr, KIND: tl.constexpr, STRATIFIED: tl.constexpr,
    CORRECTED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Columns first, first + 1, ...: where their embeddings start, row offsets from there, items.

    Offsets are 64-bit where items are anywhere and 32-bit where they follow a 64-bit start.
    """
    k = first + tl.arange(0, BN)
    ok = k < num_columns
    bias = tl.zeros([BN], tl.float32)
    if SAMPLED:
        offsets, log_count = draw_set(
            seed, set_number, k, Source, Alias, LogQ, PoolSize, num_columns, range_size,
            log_range, inverse_log, KIND, STRATIFIED, CORRECTED,
        )  # fmt: skip
        start = C
        items = offsets.to(tl.int32)
        if HAS_BIAS:
            bias = tl.load(B + offsets, mask=ok, other=0.0).to(tl.float32)
    else:
        offsets = tl.arange(0, BN)
        start = C + tl.cast(first, tl.int64) * stride_c
        log_count = bias
        items = k.to(tl.int32)
        if HAS_BIAS:
            bias = tl.load(B + first + offsets, mask=ok, other=0.0).to(tl.float32)
    return start, offsets, items, log_count, bias, ok


@triton.jit
def rows_by_columns(x, TRANSPOSED: tl.constexpr):
    """A value per row as it broadcasts over a tile (rows, columns), or over its transpose."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def columns_by_rows(x, TRANSPOSED: tl.constexpr):
    """A value per column as it broadcasts over a tile (rows, columns), or over its transpose."""
    return x[:, None] if TRANSPOSED else x[None, :]


@triton.jit
def dots_of_tile(
    e_start, e_offsets, e_tile, row_ok, c_start, c_offsets, c_tile, column_ok, bias,
    width, stride_e, stride_c,
    HAS_BIAS: tl.constexpr, HAVE_E: tl.constexpr, HAVE_C: tl.constexpr,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    NUM_D: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products (plus bias) of a tile, float32; operands are given where they fit whole."""
    if TRANSPOSED:  # noqa: SIM108 (a branch at compile time)
        dots = tl.zeros([BN, BM], tl.float32)
    else:
        dots = tl.zeros([BM, BN], tl.float32)
    for part in tl.static_range(NUM_D):
        d = part * BD + tl.arange(0, BD)
        if HAVE_E:  # noqa: SIM108
            e = e_tile
        else:
            e = load_rows(e_start, e_offsets, row_ok, d, width, stride_e, UPCAST)
        if HAVE_C:
            c = c_tile
        else:
            c = load_rows(c_start, c_offsets, column_ok, d, width, stride_c, UPCAST)
        if TRANSPOSED:
            dots = tl.dot(c, tl.trans(e), dots, input_precision=PRECISION)
        else:
            dots = tl.dot(e, tl.trans(c), dots, input_precision=PRECISION)
    if HAS_BIAS:
        dots += columns_by_rows(bias, TRANSPOSED)
    return dots


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_columns",
        "share",
        "columns_per_split",
        "range_size",
        "log_range",
    ]
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
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    tiles_per_set = tl.cdiv(share, BM)
    set_number = tile // tiles_per_set
    set_number = set_number.to(tl.int64)
    rows = set_number * share + (tile % tiles_per_set) * BM + tl.arange(0, BM)
    row_ok = rows < tl.minimum((set_number + 1) * share, num_tokens)
    target = tl.load(Y + rows, mask=row_ok, other=-1).to(tl.int32)
    seed = tl.load(Seed)
    e_tile = load_rows(E, rows, row_ok & (target >= 0), tl.arange(0, BD), width, stride_e, UPCAST)
    top = tl.full([BM], NEVER, tl.float32)
    total = tl.zeros([BM], tl.float32)
    extra = tl.zeros([BM], tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, num_columns)
    for start in range(first, last, BN):
        c_start, offsets, items, log_count, bias, column_ok = columns_of_tile(
            C, B, start, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, stride_c,
            range_size, log_range, inverse_log, HAS_BIAS, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
        )  # fmt: skip
        dots = dots_of_tile(
            E, rows, e_tile, row_ok, c_start, offsets, e_tile, column_ok, bias, width, stride_e,
            stride_c, HAS_BIAS, NUM_D == 1, False, False, BM, BN, BD, NUM_D, UPCAST, PRECISION,
        )  # fmt: skip
        logits = to_logits(dots, scale, softcap, SOFTCAP)
        if EXTRA == 1:
            extra += tl.sum(tl.where(column_ok[None, :], logits, 0.0), 1)
        hit = column_ok[None, :] & (items[None, :] == target[:, None])
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
def upstream_of_rows(
    rows, row_ok, Base, GradBase, GradTarget, GradMean, Share,
    SAMPLED: tl.constexpr, SIGMOID: tl.constexpr, HAS_MEAN: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """What the gradient of a tile needs of its rows: base, three upstream gradients, share."""
    grad_base = tl.load(GradBase + rows, mask=row_ok, other=0.0)
    base = grad_base
    grad_target = grad_base
    grad_mean = grad_base
    part = grad_base
    if not SIGMOID:
        base = tl.load(Base + rows, mask=row_ok, other=0.0)
    if not SAMPLED:
        grad_target = tl.load(GradTarget + rows, mask=row_ok, other=0.0)
    if HAS_MEAN:
        grad_mean = tl.load(GradMean + rows, mask=row_ok, other=0.0)
    if SAMPLED and FILTER > 0:
        part = tl.load(Share + rows, mask=row_ok, other=1.0)
    return base, grad_base, grad_target, grad_mean, part


@triton.jit
def gradient_of_tile(
    dots, rows, target, base, grad_base, grad_target, grad_mean, part,
    items, log_count, first, filter_seed, num_columns, scale, softcap, eps,
    SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, HITS: tl.constexpr, CORRECTED: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_MEAN: tl.constexpr, FILTER: tl.constexpr,
    TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss with respect to dot product / scale, from normalised upstream ones.

    Needs no mask: rows outside have upstream gradients of 0, and what columns outside get is
    multiplied by embeddings of 0 (dE) or not stored (dC).
    """
    logits = to_logits(dots, scale, softcap, SOFTCAP)
    hit = columns_by_rows(items, TRANSPOSED) == rows_by_columns(target, TRANSPOSED)
    if SIGMOID:
        p = sigmoid(logits)
        if HITS == HITS_DROP:
            p = tl.where(hit, 0.0, p)
    else:
        value = logits
        if SAMPLED and CORRECTED:
            value -= columns_by_rows(log_count, TRANSPOSED)
        p = probability(value, rows_by_columns(base, TRANSPOSED))
        if SAMPLED and HITS != 0:
            p = tl.where(hit, 0.0, p)
        if FILTER > 0:
            if SAMPLED:
                p *= rows_by_columns(part, TRANSPOSED)
            p = filter_tile(
                p, filter_seed, rows, first, num_columns, eps, FILTER, TRANSPOSED, BM, BN
            )
            if SAMPLED:
                p /= rows_by_columns(part, TRANSPOSED)
    grad = p * rows_by_columns(grad_base, TRANSPOSED)
    if HAS_MEAN:
        grad += rows_by_columns(grad_mean, TRANSPOSED)
    if not SAMPLED:
        grad += tl.where(hit, rows_by_columns(grad_target, TRANSPOSED), 0.0)
    if SOFTCAP:
        grad *= 1.0 - (logits / softcap) * (logits / softcap)
    return grad


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_columns",
        "share",
        "columns_per_split",
        "range_size",
        "log_range",
    ]
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
    """Own dE of a tile of rows and a part of the width, over one split of the columns."""
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    tiles_per_set = tl.cdiv(share, BM)
    set_number = tile // tiles_per_set
    set_number = set_number.to(tl.int64)
    rows = set_number * share + (tile % tiles_per_set) * BM + tl.arange(0, BM)
    row_ok = rows < tl.minimum((set_number + 1) * share, num_tokens)
    target = tl.load(Y + rows, mask=row_ok, other=-1).to(tl.int32)
    seed = tl.load(Seed)
    filter_seed = tl.load(FilterSeed)
    ok = row_ok & (target >= 0)
    d = part * BD + tl.arange(0, BD)
    e_tile = load_rows(E, rows, ok, d, width, stride_e, UPCAST)
    base, grad_base, grad_target, grad_mean, portion = upstream_of_rows(
        rows, ok, Base, GradBase, GradTarget, GradMean, Share, SAMPLED, SIGMOID, HAS_MEAN, FILTER
    )
    acc = tl.zeros([BM, BD], tl.float32)
    first = split * columns_per_split
    last = tl.minimum(first + columns_per_split, num_columns)
    for start in range(first, last, BN):
        c_start, offsets, items, log_count, bias, column_ok = columns_of_tile(
            C, B, start, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, stride_c,
            range_size, log_range, inverse_log, HAS_BIAS, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
        )  # fmt: skip
        c_tile = load_rows(c_start, offsets, column_ok, d, width, stride_c, UPCAST)
        dots = dots_of_tile(
            E, rows, e_tile, ok, c_start, offsets, c_tile, column_ok, bias, width, stride_e,
            stride_c, HAS_BIAS, NUM_D == 1, NUM_D == 1, False, BM, BN, BD, NUM_D, UPCAST,
            PRECISION,
        )  # fmt: skip
        grad = gradient_of_tile(
            dots, rows, target, base, grad_base, grad_target, grad_mean, portion, items,
            log_count, start, filter_seed, num_columns, scale, softcap, eps, SOFTCAP,
            SAMPLED, HITS, CORRECTED, SIGMOID, HAS_MEAN, FILTER, False, BM, BN,
        )  # fmt: skip
        if FILTER > 0:
            if tl.max(tl.abs(grad)) > 0.0:
                acc = tl.dot(grad.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(grad.to(c_tile.dtype), c_tile, acc, input_precision=PRECISION)
    if SAMPLED and split == 0:
        # The full softmax meets its targets among the columns; sampled ones are added here.
        grad = tl.load(GradTarget + rows, mask=ok, other=0.0)
        if SOFTCAP:
            positive = tl.load(Positive + rows, mask=row_ok, other=0.0)
            grad *= 1.0 - (positive / softcap) * (positive / softcap)
        acc += grad[:, None] * load_rows(
            C, tl.maximum(target, 0).to(tl.int64), ok, d, width, stride_c, UPCAST
        ).to(tl.float32)
    tl.store(
        Out + (split * num_tokens + rows[:, None]) * width + d[None, :],
        (acc * tl.load(Scale)).to(Out.dtype.element_ty),
        mask=row_ok[:, None] & (d < width)[None, :],
    )


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_columns",
        "share",
        "rows_per_split",
        "range_size",
        "log_range",
    ]
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
    """Own dC (and db) of a tile of columns and a part of the width, over one split of a set's rows.

    The full softmax owns its rows of dC and stores them; negatives are added atomically, in
    fixed point where Out holds integers, which no order of additions can change.
    """
    column_tiles = tl.cdiv(num_columns, BN)
    tile = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    set_number = tile // column_tiles
    first = (tile % column_tiles) * BN
    set_number = set_number.to(tl.int64)
    seed = tl.load(Seed)
    filter_seed = tl.load(FilterSeed)
    c_start, offsets, items, log_count, bias, column_ok = columns_of_tile(
        C, B, first, set_number, seed, Source, Alias, LogQ, PoolSize, num_columns, stride_c,
        range_size, log_range, inverse_log, HAS_BIAS, SAMPLED, KIND, STRATIFIED, CORRECTED, BN,
    )  # fmt: skip
    d = part * BD + tl.arange(0, BD)
    c_tile = load_rows(c_start, offsets, column_ok, d, width, stride_c, UPCAST)
    acc = tl.zeros([BN, BD], tl.float32)
    acc_bias = tl.zeros([BN], tl.float32)
    begin = set_number * share + split * rows_per_split
    end = tl.minimum(tl.minimum(begin + rows_per_split, (set_number + 1) * share), num_tokens)
    # The tile is computed as (columns, rows): its gradient is then the left operand of dC as it
    # stands in registers.
    for start in range(begin, end, BM):
        local = tl.arange(0, BM)
        begin_of_tile = tl.cast(start, tl.int64)
        rows = begin_of_tile + local
        target = tl.load(Y + rows, mask=rows < end, other=-1).to(tl.int32)
        ok = (rows < end) & (target >= 0)
        e_start = E + begin_of_tile * stride_e
        e_tile = load_rows(e_start, local, ok, d, width, stride_e, UPCAST)
        dots = dots_of_tile(
            e_start, local, e_tile, ok, c_start, offsets, c_tile, column_ok, bias, width, stride_e,
            stride_c, HAS_BIAS, NUM_D == 1, NUM_D == 1, True, BM, BN, BD, NUM_D, UPCAST, PRECISION,
        )  # fmt: skip
        base, grad_base, grad_target, grad_mean, portion = upstream_of_rows(
            rows, ok, Base, GradBase, GradTarget, GradMean, Share, SAMPLED, SIGMOID, HAS_MEAN,
            FILTER,
        )  # fmt: skip
        grad = gradient_of_tile(
            dots, rows, target, base, grad_base, grad_target, grad_mean, portion, items,
            log_count, first, filter_seed, num_columns, scale, softcap, eps, SOFTCAP,
            SAMPLED, HITS, CORRECTED, SIGMOID, HAS_MEAN, FILTER, True, BM, BN,
        )  # fmt: skip
        if HAS_BIAS:
            acc_bias += tl.sum(grad, 1)
        if FILTER > 0:
            if tl.max(tl.abs(grad)) > 0.0:
                acc = tl.dot(grad.to(e_tile.dtype), e_tile, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(grad.to(e_tile.dtype), e_tile, acc, input_precision=PRECISION)
    acc *= tl.load(Scale)
    acc_bias *= tl.load(Scale)
    inside = column_ok[:, None] & (d < width)[None, :]
    if SAMPLED:
        place = Out + offsets[:, None] * width + d[None, :]
        tl.atomic_add(place, acc.to(Out.dtype.element_ty), mask=inside, sem="relaxed")
        if HAS_BIAS and part == 0:
            value = acc_bias.to(OutBias.dtype.element_ty)
            tl.atomic_add(OutBias + offsets, value, mask=column_ok, sem="relaxed")
    else:
        row = split * num_columns + first
        place = Out + row * width + offsets[:, None] * width + d[None, :]
        tl.store(place, acc.to(Out.dtype.element_ty), mask=inside)
        if HAS_BIAS and part == 0:
            tl.store(OutBias + row + offsets, acc_bias, mask=column_ok)
