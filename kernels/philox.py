"""Philox4x32-10 in plain torch: the bits of `triton.language.randint4x`, on any device.

The CPU fallback, the reference and the GPU kernels therefore draw the same negatives from the
same seed, and a backward pass draws them again instead of keeping them.

References
----------
.. [1] Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10


def philox4x32(seed: Tensor | int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words per counter.

    Parameters
    ----------
    seed : int or Tensor, shape (), int64
        64-bit key.
    counter : Tensor, any shape, int64
        64-bit position in the stream; never negative.

    Returns
    -------
    tuple of 4 Tensor, shape of `counter`, int64
        Words in [0, 2**32).
    """
    key_low = seed & MASK_32
    key_high = (seed >> 32) & MASK_32
    word_0 = counter & MASK_32
    word_1 = counter >> 32 & MASK_32
    word_2 = torch.zeros_like(counter)
    word_3 = torch.zeros_like(counter)
    for _ in range(_NUM_ROUNDS):
        # A 32 x 32-bit product wraps modulo 2**64 in int64: its bits are still right.
        product_b = word_2 * _ROUND_B
        product_a = word_0 * _ROUND_A
        word_0 = (product_b >> 32).bitwise_and_(MASK_32).bitwise_xor_(word_1).bitwise_xor_(key_low)
        word_2 = (product_a >> 32).bitwise_and_(MASK_32).bitwise_xor_(word_3).bitwise_xor_(key_high)
        word_1 = product_b.bitwise_and_(MASK_32)
        word_3 = product_a.bitwise_and_(MASK_32)
        key_low = (key_low + _KEY_A) & MASK_32
        key_high = (key_high + _KEY_B) & MASK_32
    return word_0, word_1, word_2, word_3


def words(seed: Tensor | int, rows: Tensor, num: int, words_per_draw: int = 1) -> Tensor:
    """Words of draws 0..num-1 of each row, all four words of a counter used.

    Draw k of row g takes its words from counter `g * ceil(num / per) + k // per`, where
    `per = 4 // words_per_draw` draws share a counter.

    Parameters
    ----------
    seed : int or Tensor, shape (), int64
        Key of the stream.
    rows : Tensor, shape (num_rows,), int64
        Streams to draw from.
    num, words_per_draw : int
        Draws per row; words each of them takes (1 or 2).

    Returns
    -------
    Tensor, shape (num_rows, num, words_per_draw), int64
        Words in [0, 2**32).
    """
    per_counter = 4 // words_per_draw
    num_counters = -(-num // per_counter)
    column = torch.arange(num_counters, device=rows.device)
    counter = rows[:, None] * num_counters + column
    stacked = torch.stack(philox4x32(seed, counter), dim=-1)
    return stacked.view(len(rows), num_counters * per_counter, words_per_draw)[:, :num]


def scale_to_range(word: Tensor, bound: Tensor | int) -> Tensor:
    """Map words to integers in [0, bound) by multiply and shift.

    Parameters
    ----------
    word : Tensor, int64
        Words in [0, 2**32).
    bound : int or Tensor, int64
        Below 2**31. The relative bias of a value is at most `bound / 2**32`.
    """
    return word * bound >> 32
