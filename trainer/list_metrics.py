"""Ranking metrics of any lists against any ground truth, as RePlay defines them.

The general, slower relative of `trainer.ranking.single_target_metrics`.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from db.measures import KS
from trainer.ranking import Frame, coverage, user_surprisal

Items = Mapping[Hashable, Sequence[Hashable]]
"""Items of each user; lists of recommendations best first."""


def list_metrics(
    recommendations: Items,
    ground_truth: Items,
    train: Items,
    ks: Sequence[int] = KS,
    *,
    average_over_train_users: bool = False,
) -> dict[str, dict[int, float]]:
    """All metrics of `db.measures.METRICS` at all cut-offs.

    Parameters
    ----------
    recommendations : mapping of user to list of items
        Best first.
    ground_truth : mapping of user to list of items
        Accuracy is averaged over its users, 0 for those without recommendations.
    train : mapping of user to list of items
        Reference of Coverage and Surprisal.
    ks : sequence of int
        Cut-offs.
    average_over_train_users : bool
        Average Surprisal over all users of `train` as the paper does, not over users with a list.

    Returns
    -------
    dict
        Metric to cut-off to value; NaN where a metric is not defined.

    Notes
    -----
    NDCG and MAP count repeats, in recommendations as in ground truth; the others do not.

    References
    ----------
    .. [1] Vasilev et al., "RePlay: a Recommendation Framework for Experimentation and Production
       Use", arXiv:2409.07272.
    """
    values: dict[str, dict[int, list[float]]] = {name: {k: [] for k in ks} for name in _ACCURACY}
    for user, relevant in ground_truth.items():
        found = _user_accuracy(recommendations.get(user, ()), relevant, ks)
        for name, per_k in found.items():
            for k, value in per_k.items():
                values[name][k].append(value)
    result = {
        name: {k: float(np.mean(found)) if found else float("nan") for k, found in per_k.items()}
        for name, per_k in values.items()
    }
    return result | _catalog_metrics(recommendations, train, ks, average_over_train_users)


_ACCURACY = ("ndcg", "hit_rate", "recall", "precision", "mrr", "map")


def _user_accuracy(
    listed: Sequence[Hashable], relevant: Sequence[Hashable], ks: Sequence[int]
) -> dict[str, dict[int, float]]:
    wanted = set(relevant)
    found: dict[str, dict[int, float]] = {name: {} for name in _ACCURACY}
    discounts = 1.0 / np.log2(np.arange(2, max(*ks, len(relevant), 2) + 2))
    for k in ks:
        top = list(listed[:k])
        hits = np.array([item in wanted for item in top], dtype=np.float64)
        ranks = np.arange(1, len(top) + 1)
        distinct = len(wanted.intersection(top))
        possible = min(k, len(relevant))
        any_hit = bool(hits.any())
        found["hit_rate"][k] = float(any_hit)
        found["recall"][k] = distinct / len(wanted) if wanted else 0.0
        found["precision"][k] = distinct / k
        found["mrr"][k] = 1.0 / (int(hits.argmax()) + 1) if any_hit else 0.0
        ideal = discounts[:possible].sum()
        found["ndcg"][k] = float((hits * discounts[: len(top)]).sum() / ideal) if possible else 0.0
        precisions = hits * np.cumsum(hits) / ranks
        found["map"][k] = float(precisions.sum() / possible) if possible else 0.0
    return found


def _catalog_metrics(
    recommendations: Items, train: Items, ks: Sequence[int], average_over_train_users: bool
) -> dict[str, dict[int, float]]:
    numbers: dict[Hashable, int] = {}
    for items in (*train.values(), *recommendations.values()):
        for item in items:
            numbers.setdefault(item, len(numbers))
    item_users = np.zeros(len(numbers), dtype=np.int64)
    for items in train.values():
        item_users[[numbers[item] for item in set(items)]] += 1
    length = max((len(items) for items in recommendations.values()), default=0)
    lists = np.full((len(recommendations), max(length, 1)), -1, dtype=np.int64)
    for row, items in enumerate(recommendations.values()):
        lists[row, : len(items)] = [numbers[item] for item in items]
    frame = Frame(item_users, len(train))
    surprisal = user_surprisal(lists, frame, ks).sum(axis=0)
    count = len(train) if average_over_train_users else len(recommendations)
    return {
        "coverage": {k: found.value for k, found in coverage(lists, frame, ks).items()},
        "surprisal": {
            k: float(total / count) if count else float("nan")
            for k, total in zip(ks, surprisal, strict=True)
        },
    }
