from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from db.errors import DataError
from trainer.data.batches import PackedSequences, TrainingBatches, item_tensor


def sequences_of(lists, max_seq_len, next_items=True):
    lengths = np.array([len(items) for items in lists])
    ends = np.cumsum(lengths)
    flat = np.concatenate([np.asarray(items, dtype=np.int32) for items in lists])
    spans = SimpleNamespace(starts=ends - lengths, ends=ends)
    return PackedSequences(
        torch.from_numpy(flat), spans, max_seq_len=max_seq_len, next_items=next_items
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    max_seq_len=st.integers(1, 6),
    next_items=st.booleans(),
    on_host=st.booleans(),
    seed=st.integers(0, 20),
)
def test_batch_equals_slicing_user_by_user(lengths, max_seq_len, next_items, on_host, seed):
    generator = np.random.default_rng(seed)
    lists = [generator.integers(100, size=n).tolist() for n in lengths]
    if not any(lists):
        lists[0] = [5, 6]
    users = generator.permutation(len(lists))
    sequences = sequences_of(lists, max_seq_len, next_items)
    if not on_host:
        sequences._host = None  # gather as on an accelerator
    batch = sequences.batch(users)
    assert sorted(batch.users) == sorted(users)
    items, targets, positions, sizes, firsts = [], [], [], [], []
    for user in batch.users:
        kept = lists[user][-(max_seq_len + next_items) :]
        inputs = kept[:-1] if next_items else kept
        if next_items and 0 < len(kept) <= max_seq_len:
            firsts.append(kept[0])
        if not inputs:
            continue
        sizes.append(len(inputs))
        items += inputs
        targets += kept[1:] if next_items else []
        positions += list(range(max_seq_len - len(inputs), max_seq_len))
    assert batch.items.tolist() == items
    assert batch.targets.tolist() == targets
    assert batch.positions.tolist() == positions
    assert batch.lengths.tolist() == sizes == sorted(sizes)
    assert batch.first_items.tolist() == firsts
    assert batch.last_tokens().tolist() == (np.cumsum(sizes) - 1).tolist()
    assert batch.num_tokens + len(firsts) + batch.num_padded == len(users) * max_seq_len


def test_every_user_with_a_target_comes_once_per_epoch():
    lists = [[1, 2]] * 7 + [[3]] * 3
    batches = TrainingBatches(sequences_of(lists, 4), batch_size=3, min_tokens=1, seed=1)
    orders = [
        [user for batch in batches.epoch(number) for user in batch.users] for number in range(3)
    ]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert len(batches) == 3
    assert batches.num_users == 7


def test_padding_flags_keep_users_of_one_item():
    lists = [[1, 2], [3]]
    batches = TrainingBatches(sequences_of(lists, 4), batch_size=8, min_tokens=0, seed=1)
    (batch,) = batches.epoch(0)
    assert sorted(batch.first_items.tolist()) == [1, 3]


def test_epochs_depend_on_the_seed_and_number_alone_and_can_begin_anywhere():
    lists = [[1, 2]] * 20

    def order(seed, number, first=0):
        batches = TrainingBatches(sequences_of(lists, 4), batch_size=3, min_tokens=1, seed=seed)
        return [batch.users.tolist() for batch in batches.epoch(number, first)]

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)
    assert order(1, 4, first=5) == order(1, 4)[5:]


def test_no_targets_at_all_is_refused():
    with pytest.raises(DataError, match="none of the 2 training users has a target"):
        TrainingBatches(sequences_of([[1], [2]], 4), batch_size=3, min_tokens=1, seed=1)


def test_read_only_maps_are_shared_not_copied(tmp_path):
    np.save(tmp_path / "items.npy", np.arange(5, dtype=np.int32))
    mapped = np.load(tmp_path / "items.npy", mmap_mode="r")
    tensor = item_tensor(mapped, torch.device("cpu"))
    assert tensor.data_ptr() == mapped.ctypes.data
    assert tensor.tolist() == [0, 1, 2, 3, 4]
