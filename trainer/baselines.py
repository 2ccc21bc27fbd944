"""Baselines that need no training: most popular items, and what followed the last item."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import IntArray
from trainer.evaluation import HeldOut
from trainer.ranking import Scorer

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

UserScorer = Callable[[IntArray], Scorer]
"""Makes what scores some users, given as rows of a split (`trainer.evaluation.Evaluator.rank`)."""


def most_popular(dataset: "Dataset") -> UserScorer:
    """Score every item by its training rows, the same for all users."""
    counts = torch.from_numpy(np.array(dataset.item_counts, dtype=np.float32))

    def scorer(users: IntArray) -> Scorer:
        def score(rows: slice, items: slice) -> Tensor:
            return counts[items].repeat(rows.stop - rows.start, 1)

        return score

    return scorer


def last_item_markov(dataset: "Dataset", held_out: HeldOut) -> UserScorer:
    """Score items by how often they followed the user's last item in training sequences.

    Items that never followed it come after all others, most popular first.

    Parameters
    ----------
    dataset : Dataset
    held_out : HeldOut
        The split that will be ranked.
    """
    previous, following, counts = transitions(dataset)
    bounds = np.searchsorted(previous, np.arange(dataset.num_items + 1))
    popularity = np.asarray(dataset.item_counts, dtype=np.float64)
    # below 1, so that a single transition outweighs any popularity
    fallback = torch.from_numpy((popularity / (popularity.max() + 1.0)).astype(np.float32))

    def scorer(users: IntArray) -> Scorer:
        starts, ends = held_out.starts[users], held_out.ends[users]
        last = np.where(ends > starts, dataset.items[np.maximum(ends - 1, 0)], -1)

        def score(rows: slice, items: slice) -> Tensor:
            scores = fallback[items].repeat(rows.stop - rows.start, 1)
            for row, item in enumerate(last[rows]):
                if item < 0:
                    continue
                part = slice(bounds[item], bounds[item + 1])
                low, high = part.start + np.searchsorted(following[part], [items.start, items.stop])
                columns = torch.from_numpy(following[low:high] - items.start)
                scores[row, columns] += torch.from_numpy(counts[low:high])
            return scores

        return score

    return scorer


def transitions(
    dataset: "Dataset",
) -> tuple[IntArray, IntArray, "np.ndarray[tuple[int], np.dtype[np.float32]]"]:
    """Pairs of consecutive items in the training sequences with their counts.

    Returns
    -------
    previous, following : ndarray, shape (pairs,), int64
        Ascending by both.
    counts : ndarray, shape (pairs,), float32
    """
    starts, ends = dataset.train.starts, dataset.train.ends
    lengths = np.maximum(ends - starts - 1, 0)
    total = np.cumsum(lengths)
    index = np.arange(total[-1]) + np.repeat(starts - (total - lengths), lengths)
    items = np.asarray(dataset.items)
    codes = items[index].astype(np.int64) * dataset.num_items + items[index + 1]
    pairs, counts = np.unique(codes, return_counts=True)
    return pairs // dataset.num_items, pairs % dataset.num_items, counts.astype(np.float32)
