"""Full-catalog ranking and the metrics of its lists, with standard errors over users."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from db.measures import KS
from trainer.data.batches import IntArray, PackedSequences
from trainer.models.network import SequenceModel

DEFAULT_BUDGET = 64 * 2**20
"""Bytes of scores that an evaluation holds at once."""
_REPLICATES = 256
_TOKENS_PER_BATCH = 16_384

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frame:
    """The users and items that Coverage and Surprisal refer to.

    Attributes
    ----------
    item_users : ndarray, shape (V,), int64
        Distinct users of each item; items with none are no part of the catalog of Coverage.
    num_users : int
        Users of the frame.
    average_over_users : bool
        Average Surprisal over all users of the frame, those without a list counting 0, as the
        paper does, instead of over the users with a list.
    """

    item_users: IntArray
    num_users: int
    average_over_users: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its standard error over users; NaN where it is not defined."""

    value: float
    standard_error: float


Scorer = Callable[[slice, slice], Tensor]
"""A new tensor of fp32 scores for some of the users and some of the items."""


def rank_items(
    score: Scorer,
    num_users: int,
    num_items: int,
    *,
    device: torch.device,
    seen: tuple[IntArray, IntArray] | None = None,
    k: int = max(KS),
    budget_bytes: int = DEFAULT_BUDGET,
) -> IntArray:
    """Exact top items of each user over the whole catalog; equal scores by ascending item.

    Scores are held for a part of the users and items at a time.

    Parameters
    ----------
    score : callable
        Makes the scores of a slice of users and a slice of items.
    num_users, num_items : int
        U and V.
    device : torch.device
        Where scores are made.
    seen : (ndarray, ndarray), optional
        Users and items, int64, of the pairs that must not be recommended.
    k : int
        Length of the lists.
    budget_bytes : int
        Upper bound of what scores and their selection take.

    Returns
    -------
    ndarray, shape (U, k), int64
        Items, best first; -1 where a user has fewer than k candidates.
    """
    k_found = min(k, num_items)
    # topk and its sorts take as much as the scores
    cells = max(budget_bytes // 8, 1)
    chunk = min(num_items, max(cells // min(num_users or 1, 256), k_found, 1024))
    rows = max(cells // chunk, 1)
    lists = np.full((num_users, k), -1, dtype=np.int64)
    order, bounds = _by_user(seen, num_users)
    for begin in range(0, num_users, rows):
        end = min(begin + rows, num_users)
        pairs = None
        if seen is not None:
            picked = order[bounds[begin] : bounds[end]]
            by_item = picked[np.argsort(seen[1][picked], kind="stable")]
            pairs = _Pairs(seen[0][by_item] - begin, seen[1][by_item], device)
        lists[begin:end, :k_found] = _rank_rows(
            score, slice(begin, end), num_items, pairs, k_found, chunk
        )
    return lists


def inner_products(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Scorer:
    """Scores of users by their states.

    Parameters
    ----------
    states : Tensor, shape (U, d), float32
        One state per user.
    weight : Tensor, shape (V, d), float32
        Item vectors.
    bias : Tensor, shape (V,), optional
        Item biases.
    """

    def score(rows: slice, items: slice) -> Tensor:
        scores = states[rows] @ weight[items].T
        return scores if bias is None else scores.add_(bias[items])

    return score


def encode_users(
    model: SequenceModel, sequences: PackedSequences, rows: IntArray, width: int
) -> Tensor:
    """States of some users, in the order of `rows`, shape (len(rows), width), float32.

    Users are batched by length, so that grouping wastes next to nothing.
    """
    lengths = sequences.lengths[rows]
    order = np.argsort(lengths, kind="stable")
    tokens = np.cumsum(lengths[order])
    cuts = np.searchsorted(
        tokens, np.arange(1, tokens[-1] // _TOKENS_PER_BATCH + 1) * _TOKENS_PER_BATCH
    )
    device = model.output_weight.device
    states = torch.empty(len(rows), width, dtype=torch.float32, device=device)
    for part in np.split(order, np.unique(cuts)):
        if len(part):
            batch = sequences.batch(rows[part])
            # the part is sorted by length already, so the batch keeps its order
            states[torch.from_numpy(part).to(device)] = model.encode(batch).float()
    return states


def single_target_metrics(
    lists: IntArray,
    targets: IntArray,
    frame: Frame,
    ks: Sequence[int] = KS,
    *,
    seed: int = 0,
) -> dict[tuple[str, int], Estimate]:
    """All metrics of lists against one held-out item per user.

    Parameters
    ----------
    lists : ndarray, shape (U, K), int64
        Recommended items without repeats, best first, -1 past the end.
    targets : ndarray, shape (U,), int64
    frame : Frame
        Reference of Coverage and Surprisal.
    ks : sequence of int
        Cut-offs.
    seed : int
        Of the bootstrap behind the standard error of Coverage.

    Returns
    -------
    dict
        (metric, k) to its estimate, for every metric of `db.measures.METRICS`.
    """
    matches = lists == targets[:, None]
    rank = np.where(matches.any(axis=1), matches.argmax(axis=1) + 1, 0)
    found: dict[tuple[str, int], Estimate] = {}
    for k in ks:
        hit = (rank > 0) & (rank <= k)
        safe = np.where(hit, rank, 1)
        reciprocal = _estimate(hit / safe)
        rate = _estimate(hit.astype(np.float64))
        found["ndcg", k] = _estimate(hit / np.log2(safe + 1))
        found["hit_rate", k] = found["recall", k] = rate
        found["precision", k] = Estimate(rate.value / k, rate.standard_error / k)
        found["mrr", k] = found["map", k] = reciprocal
    surprisal = user_surprisal(lists, frame, ks)
    for column, k in enumerate(ks):
        found["surprisal", k] = _surprisal_estimate(surprisal[:, column], frame)
    found |= {("coverage", k): e for k, e in coverage(lists, frame, ks, seed=seed).items()}
    return found


def user_surprisal(lists: IntArray, frame: Frame, ks: Sequence[int]) -> Floats:
    """Surprisal of each user's list at each cut-off, shape (U, len(ks)).

    Notes
    -----
    Mean over k of log2(N / u) / log2(N), with N users of the frame and u of the item; an item
    that nobody has counts 1, a missing place in the list 0. NaN if the frame has one user.
    """
    weights = np.ones(len(frame.item_users))
    known = frame.item_users > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        weights[known] = np.log2(frame.num_users / frame.item_users[known]) / np.log2(
            frame.num_users
        )
    listed = np.where(lists >= 0, weights[np.maximum(lists, 0)], 0.0)
    sums = np.cumsum(listed, axis=1)
    return np.stack([sums[:, min(k, sums.shape[1]) - 1] / k for k in ks], axis=1)


def coverage(
    lists: IntArray, frame: Frame, ks: Sequence[int], *, seed: int = 0
) -> dict[int, Estimate]:
    """Share of the frame's items that some list holds, its error by bootstrap over users.

    Notes
    -----
    A resample matters only through which users it holds, so 64 resamples are one machine word
    per user and the items they cover are an OR over the users that were given the item.
    """
    catalog = frame.item_users > 0
    size = int(catalog.sum())
    words = _resamples(len(lists), seed)
    found = {}
    for k in ks:
        top = lists[:, :k]
        rows, columns = np.nonzero(top >= 0)
        items = top[rows, columns]
        inside = catalog[items]
        rows, items = rows[inside], items[inside]
        order = np.argsort(items, kind="stable")
        items = items[order]
        starts = np.flatnonzero(np.diff(items, prepend=-1))
        if not size or not len(starts):
            found[k] = Estimate(0.0 if size else float("nan"), 0.0 if size else float("nan"))
            continue
        counts = []
        for word in words:
            covered = np.bitwise_or.reduceat(word[rows[order]], starts)
            bits = np.unpackbits(covered.view(np.uint8).reshape(-1, 8), axis=1)
            counts.append(bits.sum(axis=0, dtype=np.int64))
        spread = float(np.std(np.concatenate(counts), ddof=1)) / size
        found[k] = Estimate(len(starts) / size, spread)
    return found


@functools.lru_cache(maxsize=2)
def _resamples(num_users: int, seed: int) -> npt.NDArray[np.uint64]:
    """Which users each bootstrap resample holds: bit r of word w is resample 64 w + r."""
    generator = np.random.default_rng(seed)
    words = np.zeros((_REPLICATES // 64, num_users), dtype=np.uint64)
    for number in range(_REPLICATES):
        drawn = np.unique(generator.integers(num_users, size=num_users))
        words[number // 64, drawn] |= np.uint64(1 << (number % 64))
    return words


def _estimate(values: Floats) -> Estimate:
    count = len(values)
    if not count:
        return Estimate(float("nan"), float("nan"))
    error = float(values.std(ddof=1)) / count**0.5 if count > 1 else float("nan")
    return Estimate(float(values.mean()), error)


def _surprisal_estimate(values: Floats, frame: Frame) -> Estimate:
    listed = _estimate(values)
    if not frame.average_over_users or not frame.num_users:
        return listed
    share = len(values) / frame.num_users
    return Estimate(listed.value * share, listed.standard_error * share)


def _by_user(seen: tuple[IntArray, IntArray] | None, num_users: int) -> tuple[IntArray, IntArray]:
    if seen is None:
        return np.empty(0, dtype=np.int64), np.zeros(num_users + 1, dtype=np.int64)
    order = np.argsort(seen[0], kind="stable")
    return order, np.searchsorted(seen[0][order], np.arange(num_users + 1))


class _Pairs:
    """Pairs of row and item, ascending by item, to be masked in scores."""

    def __init__(self, rows: IntArray, items: IntArray, device: torch.device) -> None:
        self._items = items
        self._rows_there = torch.from_numpy(rows).to(device)
        self._items_there = torch.from_numpy(items).to(device)

    def mask(self, scores: Tensor, begin: int) -> None:
        """Mask in scores whose first column is item `begin`."""
        low, high = np.searchsorted(self._items, [begin, begin + scores.shape[1]])
        scores[self._rows_there[low:high], self._items_there[low:high] - begin] = -torch.inf


def _rank_rows(
    score: Scorer, rows: slice, num_items: int, pairs: _Pairs | None, k: int, chunk: int
) -> IntArray:
    """Top items of some users, scores of `chunk` items at a time."""
    values: Tensor | None = None
    items: Tensor | None = None
    for begin in range(0, num_items, chunk):
        scores = score(rows, slice(begin, min(begin + chunk, num_items)))
        if pairs is not None:
            pairs.mask(scores, begin)
        new_values, new_items = _top(scores, min(k, scores.shape[1]))
        new_items = new_items + begin
        if values is None or items is None:
            values, items = new_values, new_items
            continue
        # earlier chunks hold smaller items, so a stable sort keeps equal scores by item
        values = torch.cat([values, new_values], dim=1)
        items = torch.cat([items, new_items], dim=1)
        values, place = values.sort(dim=1, descending=True, stable=True)
        values, items = values[:, :k], items.gather(1, place[:, :k])
    assert values is not None
    assert items is not None
    return items.masked_fill(values == -torch.inf, -1).cpu().numpy()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest scores with their columns; equal scores by ascending column."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if values.shape[1] > k:
        # topk picks any of the scores equal to the last: where some were left out, sort fully
        cut = values[:, k - 1] == values[:, k]
        cut &= values[:, k] > -torch.inf
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        if bool(cut.any()):
            full, order = scores[cut].sort(dim=1, descending=True, stable=True)
            values[cut], columns[cut] = full[:, :k], order[:, :k]
    columns, place = columns.sort(dim=1)
    values, order = values.gather(1, place).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
