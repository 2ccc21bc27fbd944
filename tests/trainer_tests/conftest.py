"""Small sequences and the padded reference that packed models are held against."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from db.measures import EvaluationRecord, HistogramRecord, StepRecord

sys.path.insert(0, str(Path(__file__).parent))


@dataclasses.dataclass
class ListRecorder:
    """Keeps what training reports."""

    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    evaluations: list[EvaluationRecord] = dataclasses.field(default_factory=list)
    histograms: list[HistogramRecord] = dataclasses.field(default_factory=list)

    def step(self, record):
        self.steps.append(record)

    def evaluation(self, records):
        self.evaluations.extend(records)

    def histogram(self, record):
        self.histograms.append(record)


def make_dataset(num_users=60, num_items=40, max_length=24, seed=0):
    """Users who walk along a ring of items; the next item is the last one plus 1 to 3.

    The first 4 in 5 users train, one in ten each validate and test on their last item.
    """
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, max_length + 1, size=num_users)
    walks = [
        (generator.integers(num_items) + np.cumsum(generator.integers(1, 4, size=n))) % num_items
        for n in lengths
    ]
    # every item occurs, so the catalog is whole
    walks[0] = np.arange(num_items)
    lengths = np.array([len(walk) for walk in walks])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.concatenate(walks).astype(np.int32)
    cut, end = num_users * 8 // 10, num_users * 9 // 10

    def spans(users, held_out):
        found = SimpleNamespace(
            users=users, starts=offsets[users], ends=offsets[users + 1] - int(held_out)
        )
        if held_out:
            found.targets = items[offsets[users + 1] - 1].astype(np.int64)
        return found

    train = np.arange(cut)
    item_users = np.zeros(num_items, dtype=np.int64)
    for user in train:
        item_users[np.unique(walks[user])] += 1
    history_users = np.zeros(num_items, dtype=np.int64)
    for user in range(end, num_users):
        history_users[np.unique(walks[user][:-1])] += 1
    return SimpleNamespace(
        name="ring",
        fingerprint="0" * 64,
        num_items=num_items,
        num_users=num_users,
        items=items,
        offsets=offsets,
        train=spans(train, False),
        validation=spans(np.arange(cut, end), True),
        test=spans(np.arange(end, num_users), True),
        item_counts=np.bincount(items[: offsets[cut]], minlength=num_items),
        item_users=item_users,
        num_train_users=cut,
        test_history_item_users=history_users,
        num_test_history_users=num_users - end,
    )


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def recorder():
    return ListRecorder()
