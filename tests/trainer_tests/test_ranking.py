import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from db.measures import METRICS
from trainer.list_metrics import list_metrics
from trainer.ranking import (
    Frame,
    coverage,
    inner_products,
    rank_items,
    single_target_metrics,
)

NAMES = {
    "ndcg": "NDCG",
    "hit_rate": "HitRate",
    "recall": "Recall",
    "precision": "Precision",
    "mrr": "MRR",
    "map": "MAP",
    "coverage": "Coverage",
    "surprisal": "Surprisal",
}


@pytest.fixture(scope="module")
def cases(shared):
    found = json.loads((shared / "golden" / "metrics_golden.json").read_text())["cases"]
    return {case["name"]: case for case in found if case["name"] != "ties_in_scores"}


def best_first(case):
    return {
        user: [item for item, _ in sorted(pairs, key=lambda pair: -pair[1])]
        for user, pairs in case["recommendations"].items()
    }


def same(value, expected):
    if expected == "nan":
        return math.isnan(value)
    return value == pytest.approx(expected, abs=1e-9)


def test_golden_metrics(cases):
    assert len(cases) == 8
    for name, case in cases.items():
        lists = best_first(case)
        found = list_metrics(lists, case["ground_truth"], case["train"], case["ks"])
        assert set(found) == set(METRICS)
        for metric, per_k in found.items():
            for k, value in per_k.items():
                expected = case["expected"][NAMES[metric]][str(k)]
                assert same(value, expected), (name, metric, k, value, expected)


def test_golden_surprisal_of_the_paper(cases):
    for name, case in cases.items():
        found = list_metrics(
            best_first(case),
            case["ground_truth"],
            case["train"],
            case["ks"],
            average_over_train_users=True,
        )
        for k, expected in case["vendored_memsrs_surprisal"]["Surprisal"].items():
            assert same(found["surprisal"][int(k)], expected), (name, k)


def brute_force(scores, seen, k):
    """Items in order of score, then item."""
    lists = []
    for row, hidden in zip(scores, seen, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item))
        kept = [item for item in order if item not in hidden][:k]
        lists.append(kept + [-1] * (k - len(kept)))
    return np.array(lists)


@settings(deadline=None, max_examples=60)
@given(
    num_users=st.integers(1, 7),
    num_items=st.integers(1, 40),
    k=st.integers(1, 12),
    levels=st.integers(1, 6),
    budget=st.sampled_from([8, 200, 2**20]),
    seed=st.integers(0, 100),
)
def test_ranking_equals_sorting_with_ties(num_users, num_items, k, levels, budget, seed):
    generator = np.random.default_rng(seed)
    # few different scores: most are tied
    scores = generator.integers(levels, size=(num_users, num_items)).astype(np.float32)
    seen = [
        set(np.flatnonzero(generator.random(num_items) < 0.3).tolist()) for _ in range(num_users)
    ]
    pairs = [(user, item) for user, items in enumerate(seen) for item in items]
    generator.shuffle(pairs)
    users, items = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    table = torch.from_numpy(scores)
    lists = rank_items(
        lambda rows, columns: table[rows, columns].clone(),
        num_users,
        num_items,
        device=torch.device("cpu"),
        seen=(users, items),
        k=k,
        budget_bytes=budget,
    )
    np.testing.assert_array_equal(lists, brute_force(scores, seen, k))


def test_scores_never_exceed_the_budget():
    states, weight = torch.randn(600, 4), torch.randn(5000, 4)
    largest = 0
    score = inner_products(states, weight)

    def watched(rows, items):
        nonlocal largest
        found = score(rows, items)
        largest = max(largest, found.numel() * 4)
        return found

    options = {"device": torch.device("cpu"), "k": 10}
    lists = rank_items(watched, 600, 5000, budget_bytes=2**20, **options)
    assert largest <= 2**20
    whole = rank_items(score, 600, 5000, budget_bytes=2**30, **options)
    np.testing.assert_array_equal(lists, whole)


def test_inner_products_add_item_biases():
    states, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    found = inner_products(states, weight, bias)(slice(1, 3), slice(2, 7))
    torch.testing.assert_close(found, (states @ weight.T + bias)[1:3, 2:7])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), num_users=st.integers(2, 12), length=st.integers(1, 9))
def test_single_target_metrics_equal_the_general_ones(seed, num_users, length):
    generator = np.random.default_rng(seed)
    num_items = 15
    lists = np.full((num_users, length), -1)
    for row in lists:
        size = generator.integers(0, length + 1)
        row[:size] = generator.permutation(num_items)[:size]
    targets = generator.integers(num_items, size=num_users)
    train = {user: generator.integers(num_items, size=4).tolist() for user in range(100, 100 + 6)}
    item_users = np.zeros(num_items, dtype=np.int64)
    for items in train.values():
        item_users[list(set(items))] += 1
    ks = (1, 3, 9)
    found = single_target_metrics(lists, targets, Frame(item_users, len(train)), ks)
    expected = list_metrics(
        {user: [i for i in row.tolist() if i >= 0] for user, row in enumerate(lists)},
        {user: [target] for user, target in enumerate(targets.tolist())},
        train,
        ks,
    )
    for (metric, k), estimate in found.items():
        assert estimate.value == pytest.approx(expected[metric][k], abs=1e-12), (metric, k)
    assert {metric for metric, _ in found} == set(METRICS)


def test_standard_errors_are_those_of_means():
    generator = np.random.default_rng(0)
    lists = np.array([generator.permutation(30)[:10] for _ in range(200)])
    targets = generator.integers(30, size=200)
    frame = Frame(np.full(30, 5), 50)
    found = single_target_metrics(lists, targets, frame, (10,))
    ranks = [
        row.tolist().index(t) + 1 if t in row else 0 for row, t in zip(lists, targets, strict=True)
    ]
    gains = np.array([1 / math.log2(r + 1) if r else 0.0 for r in ranks])
    assert found["ndcg", 10].standard_error == pytest.approx(gains.std(ddof=1) / 200**0.5)
    assert found["surprisal", 10].standard_error == pytest.approx(0.0, abs=1e-12)
    hits = gains > 0
    assert found["precision", 10].standard_error == pytest.approx(hits.std(ddof=1) / 200**0.5 / 10)


def test_coverage_error_is_that_of_resampled_users():
    generator = np.random.default_rng(1)
    lists = (generator.pareto(1.0, size=(80, 5)) * 10).astype(np.int64) % 60
    frame = Frame(np.ones(60, dtype=np.int64), 10)
    found = coverage(lists, frame, [5], seed=3)[5]
    plain = []
    for _ in range(2000):
        rows = generator.integers(80, size=80)
        plain.append(len(np.unique(lists[rows])) / 60)
    assert found.value == len(np.unique(lists)) / 60
    assert found.standard_error == pytest.approx(np.std(plain), rel=0.2)
    assert coverage(lists, frame, [5], seed=3)[5] == found
    assert coverage(lists, frame, [5], seed=4)[5].standard_error != found.standard_error


def test_frame_of_the_paper_averages_over_all_its_users():
    lists = np.array([[0, 1], [2, 0]])
    item_users = np.array([4, 1, 0])
    plain = single_target_metrics(lists, np.array([0, 0]), Frame(item_users, 8), (2,))
    paper = single_target_metrics(lists, np.array([0, 0]), Frame(item_users, 8, True), (2,))
    assert paper["surprisal", 2].value == pytest.approx(plain["surprisal", 2].value * 2 / 8)
    assert paper["coverage", 2].value == plain["coverage", 2].value == 1.0


def test_metrics_without_lists_are_undefined_not_wrong():
    empty = np.full((2, 3), -1)
    found = single_target_metrics(empty, np.array([0, 1]), Frame(np.array([1, 1]), 2), (3,))
    assert found["ndcg", 3].value == found["coverage", 3].value == found["surprisal", 3].value == 0
    one = np.zeros((2, 1), dtype=np.int64)
    lonely = single_target_metrics(one, np.array([0, 1]), Frame(np.array([1, 1]), 1), (1,))
    assert math.isnan(lonely["surprisal", 1].value)
