import numpy as np
import pytest

from db.errors import DataError
from trainer.data import generate as module
from trainer.data.generate import GeneratedSource, GeneratorOptions, generate, generate_blocks
from trainer.data.prepare import prepare
from trainer.data.sources import open_source
from trainer.data.write import write_interactions


def ndcg(ranks):
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean())


def test_same_seed_same_rows():
    first, second = generate(50, 80, 10, seed=1), generate(50, 80, 10, seed=1)
    other = generate(50, 80, 10, seed=2)
    for column in ("users", "items", "timestamps"):
        assert np.array_equal(getattr(first, column), getattr(second, column))
    assert len(other) != len(first) or not np.array_equal(first.items, other.items)


def test_pinned_rows():
    """Figures that rest on generated data stay comparable only while the recipe is the same."""
    events = generate(20, 30, 5, seed=7)
    assert len(events) == 142
    assert events.items[:8].tolist() == [4, 24, 18, 20, 4, 24, 2, 25]


def test_counts_and_ranges():
    events = generate(400, 300, 25, seed=3)
    assert sorted(set(events.users.tolist())) == list(range(400))
    assert events.items.min() >= 0
    assert events.items.max() < 300
    lengths = np.bincount(events.users)
    assert lengths.min() >= 3
    assert 20 < lengths.mean() < 30
    same_user = np.diff(events.users) == 0
    assert (np.diff(events.timestamps)[same_user] >= 0).all()


def test_blocks_have_bounded_size_and_all_users(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 500)
    blocks = list(generate_blocks(GeneratorOptions(num_users=333, interactions_per_user=10)))
    assert len(blocks) == 7
    users = np.concatenate([block.users for block in blocks])
    assert sorted(set(users.tolist())) == list(range(333))
    assert max(len(block) for block in blocks) < 1500


def test_popularity_is_heavy_tailed_and_drifts():
    events = generate(2000, 1500, 30, seed=5)
    counts = np.sort(np.bincount(events.items, minlength=1500))[::-1]
    assert counts[:15].sum() > 0.05 * counts.sum()
    assert counts[0] > 10 * np.median(counts)
    early = events.timestamps < np.quantile(events.timestamps, 0.2)
    late = events.timestamps > np.quantile(events.timestamps, 0.8)
    first = np.bincount(events.items[early], minlength=1500) / early.sum()
    last = np.bincount(events.items[late], minlength=1500) / late.sum()
    still = generate(2000, 1500, 30, seed=5, drift=0.0)
    early0 = still.timestamps < np.quantile(still.timestamps, 0.2)
    late0 = still.timestamps > np.quantile(still.timestamps, 0.8)
    first0 = np.bincount(still.items[early0], minlength=1500) / early0.sum()
    last0 = np.bincount(still.items[late0], minlength=1500) / late0.sum()
    assert np.abs(first - last).sum() > 1.3 * np.abs(first0 - last0).sum()


def test_the_order_of_events_carries_information(tmp_path):
    """Popularity is beaten by the last item, and the last item by several last ones."""
    options = GeneratorOptions(num_users=1500, num_items=600, interactions_per_user=25, seed=1)
    dataset = prepare(GeneratedSource(options), tmp_path / "out")
    transitions = np.zeros((dataset.num_items, dataset.num_items))
    for start, end in zip(dataset.train.starts, dataset.train.ends, strict=True):
        sequence = dataset.items[start:end]
        np.add.at(transitions, (sequence[:-1], sequence[1:]), 1)
    popularity = dataset.item_counts / dataset.item_counts.sum()

    def quality(score):
        ranks = []
        test = dataset.test
        for start, end, target in zip(test.starts, test.ends, test.targets, strict=True):
            scores = score(dataset.items[start:end])
            ranks.append(1 + (scores > scores[target]).sum())
        return ndcg(np.array(ranks))

    popular = quality(lambda _: popularity)
    markov = quality(lambda history: transitions[history[-1]] + popularity)
    recent = quality(lambda history: sum(transitions[item] for item in history[-5:]) + popularity)
    assert markov > 3 * popular
    assert recent > 1.1 * markov


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_written_file_prepares_to_the_same_dataset(tmp_path, name):
    options = GeneratorOptions(num_users=150, num_items=90, interactions_per_user=12)
    rows = write_interactions(generate_blocks(options), tmp_path / name)
    read = prepare(open_source(name[2:], tmp_path / name), tmp_path / "read")
    direct = prepare(GeneratedSource(options), tmp_path / "direct")
    assert read.meta["counts"]["raw_rows"] == rows
    assert read.fingerprint == direct.fingerprint


def test_write_refuses_other_endings(tmp_path):
    with pytest.raises(DataError, match=r"a\.xlsx ends in '\.xlsx'; give a name in \.csv"):
        write_interactions([], tmp_path / "a.xlsx")


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    def blocks():
        yield generate(10, 10, 5)
        raise DataError("stop")

    with pytest.raises(DataError, match="stop"):
        write_interactions(blocks(), tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"num_users": 0}, "num_users=0 is below 1"),
        ({"num_items": -3}, "num_items=-3 is below 1"),
        ({"interactions_per_user": 1}, "interactions_per_user=1 is below 3"),
        ({"num_clusters": 6000}, "num_clusters=6000 is not between 1 and num_items=5000"),
        ({"drift": 1.5}, "drift=1.5 is not between 0 and 1"),
        ({"follow_probability": -0.1}, "follow_probability=-0.1 is not between 0 and 1"),
        ({"zipf_exponent": 0}, "zipf_exponent=0 is not a positive number"),
    ],
)
def test_impossible_options(option, text):
    with pytest.raises(DataError, match=text):
        next(generate_blocks(GeneratorOptions(**option)))
