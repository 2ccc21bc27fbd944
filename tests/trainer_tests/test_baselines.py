from types import SimpleNamespace

import numpy as np
import torch

from trainer.baselines import last_item_markov, most_popular, transitions
from trainer.data.batches import item_tensor
from trainer.evaluation import Evaluator, metric_frame

# users 0 and 1 train, user 2 is ranked for: seen 4, last 0
ITEMS = np.array([0, 1, 2, 0, 1, 3, 0, 2, 4, 0], dtype=np.int32)


def make():
    train = SimpleNamespace(starts=np.array([0, 3]), ends=np.array([3, 8]))
    test = SimpleNamespace(
        starts=np.array([8, 8]), ends=np.array([10, 8]), targets=np.array([1, 2])
    )
    return SimpleNamespace(
        num_items=5,
        items=ITEMS,
        train=train,
        test=test,
        item_counts=np.bincount(ITEMS[:8], minlength=5),
        item_users=np.array([2, 2, 2, 1, 0]),
        num_train_users=2,
        test_history_item_users=np.array([1, 0, 0, 0, 1]),
        num_test_history_users=1,
    )


def ranked(scorer, dataset, mask_seen=True):
    test = Evaluator(
        item_tensor(dataset.items, torch.device("cpu")),
        dataset.test,
        split="test",
        frame=metric_frame(dataset, "train", "test"),
        max_seq_len=9,
        mask_seen=mask_seen,
        budget_bytes=1,
    )
    return [[i for i in row.tolist() if i >= 0] for row in test.rank(scorer, dataset.num_items)]


def test_transitions_count_neighbours_within_a_user():
    previous, following, counts = transitions(make())
    found = dict(zip(zip(previous.tolist(), following.tolist(), strict=True), counts, strict=True))
    # user 1's sequence is 0 1 3 0 2; nothing leads from user 0's last item to it
    assert found == {(0, 1): 2, (1, 2): 1, (1, 3): 1, (3, 0): 1, (0, 2): 1}


def test_most_popular_goes_by_training_rows_then_item():
    dataset = make()
    assert ranked(most_popular(dataset), dataset) == [[1, 2, 3], [0, 1, 2, 3, 4]]
    assert ranked(most_popular(dataset), dataset, mask_seen=False)[0] == [0, 1, 2, 3, 4]


def test_markov_follows_the_last_item_then_popularity():
    dataset = make()
    lists = ranked(last_item_markov(dataset, dataset.test), dataset)
    # 0 led to 1 twice and to 2 once; without a history popularity is left
    assert lists == [[1, 2, 3], [0, 1, 2, 3, 4]]
    dataset.items = ITEMS.copy()
    dataset.items[9] = 1
    lists = ranked(last_item_markov(dataset, dataset.test), dataset, mask_seen=False)
    assert lists[0] == [2, 3, 0, 1, 4]
