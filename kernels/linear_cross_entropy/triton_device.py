"""Device functions that the Triton kernels share: loads, logits, draws, filters."""

import triton
import triton.language as tl

from kernels.sampling import (
    ALIAS,
    DROP,
    EXP2_COEFFICIENTS,
    IDS,
    LOG_RANGE_BITS,
    LOG_UNIFORM,
    POOL,
    UNIFORM,
    ZERO,
)

KIND_UNIFORM = tl.constexpr(UNIFORM)
KIND_ALIAS = tl.constexpr(ALIAS)
KIND_LOG_UNIFORM = tl.constexpr(LOG_UNIFORM)
KIND_POOL = tl.constexpr(POOL)
KIND_IDS = tl.constexpr(IDS)
HITS_DROP = tl.constexpr(DROP)
HITS_ZERO = tl.constexpr(ZERO)
_OCTAVE_SHIFT = tl.constexpr(LOG_RANGE_BITS + 32)
_FRACTION_SHIFT = tl.constexpr(LOG_RANGE_BITS + 1)
_EXP2_0, _EXP2_1, _EXP2_2, _EXP2_3, _EXP2_4, _EXP2_5, _EXP2_6 = (
    tl.constexpr(value) for value in EXP2_COEFFICIENTS
)
NEVER = tl.constexpr(-1.0e30)
"""Start of a running maximum: finite, so that masked terms (-inf) never make NaN."""


@triton.jit
def load_rows(base, rows, row_ok, columns, width, stride, UPCAST: tl.constexpr):
    """Tile (rows, columns) of a row-major matrix, 0 outside; rows are int64."""
    tile = tl.load(
        base + rows[:, None] * stride + columns[None, :],
        mask=row_ok[:, None] & (columns < width)[None, :],
        other=0.0,
    )
    if UPCAST:  # the interpreter's bf16 arithmetic is wrong
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def to_logits(dots, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled and capped dot products; tanh by exp, which the interpreter has."""
    logits = dots * scale
    if SOFTCAP:
        power = tl.minimum(2.0 * logits / softcap, 80.0)
        logits = softcap * (1.0 - 2.0 / (tl.exp(power) + 1.0))
    return logits


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def probability(value, base):
    """exp(value - base), at most 1: lanes outside the matrix must not make inf * 0."""
    return tl.exp(tl.minimum(value - base, 0.0))


@triton.jit
def finish_log_sum_exp(top, total):
    """Log-sum-exp of a running maximum and sum; -inf where nothing was summed."""
    return tl.where(total > 0.0, top + tl.log(tl.maximum(total, 1.0e-37)), float("-inf"))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow or loss at either end."""
    small = tl.exp(-tl.abs(x))
    series = small * (1.0 - small * (0.5 - small * (0.33333333 - small * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(small < 0.01, series, tl.log(1.0 + small))


@triton.jit
def place(
    word, second, k, positive, source, alias, log_q, pool_size, ok,
    num, range_size, log_range, inverse_log,
    KIND: tl.constexpr, STRATIFIED: tl.constexpr, SKIP: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    """Item id (int64) and log count (float32) of draws from their random words (uint32)."""
    log_count = tl.zeros(word.shape, tl.float32)
    if KIND == KIND_UNIFORM:
        if STRATIFIED:
            low = k.to(tl.int64) * range_size // num
            size = (k.to(tl.int64) + 1) * range_size // num - low
            ids = low + tl.umulhi(word, size.to(tl.uint32)).to(tl.int64)
            if CORRECTED:
                log_count = -tl.log(tl.maximum(size, 1).to(tl.float32))
        else:
            bound = (tl.zeros(word.shape, tl.int64) + range_size).to(tl.uint32)
            ids = tl.umulhi(word, bound).to(tl.int64)
        if SKIP:
            ids += (ids >= tl.maximum(positive, 0)).to(tl.int64)
    elif KIND == KIND_ALIAS:
        bound = (tl.zeros(word.shape, tl.int64) + range_size).to(tl.uint32)
        cell = tl.umulhi(word, bound).to(tl.int64)
        threshold = tl.load(source + cell, mask=ok, other=0).to(tl.uint32, bitcast=True)
        other = tl.load(alias + cell, mask=ok, other=0).to(tl.int64)
        ids = tl.where(second < threshold, cell, other)
        if CORRECTED:
            log_count = tl.load(log_q + ids, mask=ok, other=0.0)
    elif KIND == KIND_POOL:
        bound = (tl.zeros(word.shape, tl.int64) + tl.load(pool_size)).to(tl.uint32)
        cell = tl.umulhi(word, bound).to(tl.int64)
        ids = tl.load(source + cell, mask=ok, other=0)
        if CORRECTED:
            log_count = tl.load(log_q + cell, mask=ok, other=0.0)
    else:
        rank = log_uniform_rank(word, range_size, log_range)
        ids = tl.load(source + rank, mask=ok, other=0)
        if CORRECTED:
            y = 1.0 / (rank + 1).to(tl.float32)
            series = y * (1.0 - y * (0.5 - y * (0.33333333 - y * 0.25)))
            step = tl.where(y < 0.02, series, tl.log(1.0 + y))
            log_count = tl.log(step * inverse_log)
    return ids, log_count


@triton.jit
def log_uniform_rank(word, num_items, log_range):
    """floor(2**(u log2(V + 1))) - 1 in integers, as `kernels.sampling` has it."""
    exponent = word.to(tl.int64) * log_range
    octave = exponent >> _OCTAVE_SHIFT
    fraction = (exponent >> _FRACTION_SHIFT) & 0x7FFFFFFF
    mantissa = fraction * 0 + _EXP2_0
    mantissa = (mantissa * fraction >> 31) + _EXP2_1
    mantissa = (mantissa * fraction >> 31) + _EXP2_2
    mantissa = (mantissa * fraction >> 31) + _EXP2_3
    mantissa = (mantissa * fraction >> 31) + _EXP2_4
    mantissa = (mantissa * fraction >> 31) + _EXP2_5
    mantissa = (mantissa * fraction >> 31) + _EXP2_6
    mantissa = (mantissa * fraction >> 31) + 2147483648
    rank = (mantissa >> (31 - octave)) - 1
    return tl.minimum(tl.maximum(rank, 0), num_items - 1)


@triton.jit
def pick(k, w0, w1, w2, w3):
    """Word k % 4."""
    which = k % 4
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def draw_set(
    seed, set_number, k, source, alias, log_q, pool_size,
    num, range_size, log_range, inverse_log,
    KIND: tl.constexpr, STRATIFIED: tl.constexpr, CORRECTED: tl.constexpr,
):  # fmt: skip
    """Draws k (a block) of one set.

    Each lane computes all four words of its counter: beside the tile of logits that the draws are
    for, that costs nothing.
    """
    ok = k < num
    if KIND == KIND_IDS:
        ids = tl.load(source + set_number * num + k, mask=ok, other=0)
        log_count = tl.zeros(k.shape, tl.float32)
        if CORRECTED:
            log_count = tl.load(log_q + ids, mask=ok, other=0.0)
    elif KIND == KIND_ALIAS:
        counters = (num + 1) // 2
        w0, w1, w2, w3 = tl.randint4x(seed, set_number * counters + k // 2)
        first = tl.where(k % 2 == 0, w0, w2).to(tl.uint32, bitcast=True)
        second = tl.where(k % 2 == 0, w1, w3).to(tl.uint32, bitcast=True)
        ids, log_count = place(
            first, second, k, k, source, alias, log_q, pool_size, ok,
            num, range_size, log_range, inverse_log, KIND, STRATIFIED, False, CORRECTED,
        )  # fmt: skip
    else:
        counters = (num + 3) // 4
        w0, w1, w2, w3 = tl.randint4x(seed, set_number * counters + k // 4)
        first = pick(k, w0, w1, w2, w3).to(tl.uint32, bitcast=True)
        ids, log_count = place(
            first, first, k, k, source, alias, log_q, pool_size, ok,
            num, range_size, log_range, inverse_log, KIND, STRATIFIED, False, CORRECTED,
        )  # fmt: skip
    return tl.where(ok, ids, 0), log_count


@triton.jit
def filter_tile(
    p, seed, rows, first_column, columns_total, eps,
    MODE: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Softmax entries after the filter; logit (i, j) takes word j % 4 of its counter."""
    if MODE == 1:
        p = tl.where(p < eps, 0.0, p)
    if MODE == 2:
        quads = first_column // 4 + tl.arange(0, BN // 4)
        counter = rows[:, None] * ((columns_total + 3) // 4) + quads[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, counter)
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        if TRANSPOSED:
            word = tl.trans(word)
        uniform = (word.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604645e-08
        p = tl.where(p < eps, tl.where(uniform * eps < p, eps, 0.0), p)
    return p
