import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from db.errors import DataError
from trainer.data.dataset import load_dataset
from trainer.data.generate import generate
from trainer.data.interactions import Interactions, InteractionsSource
from trainer.data.prepare import prepare
from trainer.data.sources import SourceOptions, open_source
from trainer.data.split import FilterOptions, SplitOptions

NO_FILTER = FilterOptions(min_item_count=1, min_user_count=1)


def source_of(rows, chunk_rows=1 << 20):
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return InteractionsSource(Interactions(users, items, times), chunk_rows=chunk_rows)


def rows_of(dataset, sequences):
    """(user id, item id, time) rows of some sequences, by user id."""
    order = np.argsort(dataset.user_ids[sequences.users], kind="stable")
    return [
        (int(dataset.user_ids[u]), int(dataset.item_ids[dataset.items[at]]), int(at_time))
        for u, start, end in zip(
            sequences.users[order], sequences.starts[order], sequences.ends[order], strict=True
        )
        for at, at_time in zip(range(start, end), dataset.timestamps[start:end], strict=True)
    ]


def targets_of(dataset, evaluation):
    order = np.argsort(dataset.user_ids[evaluation.users], kind="stable")
    return [
        (
            int(dataset.user_ids[evaluation.users[k]]),
            int(dataset.item_ids[evaluation.targets[k]]),
            int(dataset.timestamps[evaluation.ends[k]]),
        )
        for k in order
    ]


def global_oracle(rows, min_item=5, min_user=3):
    """The paper's steps, row by row in plain Python."""
    items = Counter(item for _, item, _ in rows)
    rows = [row for row in rows if items[row[1]] >= min_item]
    users = Counter(user for user, _, _ in rows)
    rows = [row for row in rows if users[row[0]] >= min_user]
    rows = sorted(rows, key=lambda row: row[2])
    cutoff = rows[int(len(rows) * 0.9)][2]
    train = [row for row in rows if row[2] < cutoff]
    train_items = {row[1] for row in train}
    raw_test = [row for row in rows if row[2] >= cutoff and row[1] in train_items]
    order = list(dict.fromkeys(row[0] for row in train))
    stay = np.random.RandomState(42).choice(len(order), round(0.95 * len(order)), replace=False)
    stays = {order[k] for k in stay}
    events = [row for row in train if row[0] in stays]
    catalog = list(dict.fromkeys(row[1] for row in events))
    known = set(catalog)
    held_out, full = defaultdict(list), defaultdict(list)
    for row in train:
        if row[0] not in stays and row[1] in known:
            held_out[row[0]].append(row)
    testers = {row[0] for row in raw_test} - (set(order) - stays)
    for row in rows:
        if row[0] in testers and row[1] in known:
            full[row[0]].append(row)
    warm = {row[0] for row in events}
    history_users = defaultdict(set)
    for user, sequence in full.items():
        for _, item, _ in sequence[:-1]:
            history_users[item].add(user)
    return {
        "train": events,
        "catalog": catalog,
        "validation": {u: s for u, s in sorted(held_out.items()) if len(s) > 1},
        "test": {u: s for u, s in sorted(full.items()) if u in warm and len(s) > 1},
        "history_users": history_users,
        "num_history_users": sum(len(s) > 1 for s in full.values()),
    }


def assert_equals_oracle(dataset, expected):
    assert Counter(rows_of(dataset, dataset.train)) == Counter(expected["train"])
    assert dataset.item_ids.tolist() == expected["catalog"]
    for split in ("validation", "test"):
        sequences = expected[split]
        found = getattr(dataset, split)
        assert rows_of(dataset, found) == [row for s in sequences.values() for row in s[:-1]]
        assert targets_of(dataset, found) == [s[-1] for s in sequences.values()]
    by_item = defaultdict(set)
    for user, item, _ in expected["train"]:
        by_item[item].add(user)
    counts = Counter(item for _, item, _ in expected["train"])
    catalog = expected["catalog"]
    assert dataset.item_counts.tolist() == [counts[item] for item in catalog]
    assert dataset.item_users.tolist() == [len(by_item[item]) for item in catalog]
    history = expected["history_users"]
    assert dataset.test_history_item_users.tolist() == [len(history[item]) for item in catalog]
    assert dataset.num_test_history_users == expected["num_history_users"]


def random_rows(seed, users=60, items=40, rows=1500, times=400):
    rng = np.random.default_rng(seed)
    return list(
        zip(
            rng.integers(0, users, rows).tolist(),
            (rng.integers(0, items, rows) ** 2 // items).tolist(),
            np.sort(rng.integers(1, times, rows))[rng.permutation(rows)].tolist(),
            strict=True,
        )
    )


@pytest.mark.shared
@pytest.mark.parametrize("case", [0, 1])
def test_golden_split(shared, tmp_path, case):
    golden = json.loads((shared / "golden/splits_golden.json").read_text())
    expected = golden["cases"][case]
    file = tmp_path / "raw.csv"
    lines = ["user_id,item_id,rating,timestamp"]
    lines += [",".join(map(str, row)) for row in expected["raw"]]
    file.write_text("\n".join(lines) + "\n")
    options = SourceOptions(rating_column="rating", rating_above=golden["rating_above"])
    dataset = prepare(
        open_source("csv", file, options),
        tmp_path / "out",
        # Whom the reference drew follows from its unstable sort where times are tied.
        validation_users=expected["val_users_sampled"],
    )
    if not expected["ties"]:
        drawn = prepare(open_source("csv", file, options), tmp_path / "drawn")
        assert drawn.fingerprint == dataset.fingerprint

    def plain(frame):
        return [(user, item, time) for user, item, _, time in expected[frame]]

    assert Counter(rows_of(dataset, dataset.train)) == Counter(plain("train"))
    validation, golden_validation = rows_of(dataset, dataset.validation), plain("validation")
    if expected["ties"]:
        # Within a user's tied rows the reference's order came from the same unstable sort.
        validation, golden_validation = (
            sorted(frame, key=lambda row: (row[0], row[2], row[1]))
            for frame in (validation, golden_validation)
        )
    assert validation == golden_validation
    assert rows_of(dataset, dataset.test) == plain("test")
    assert targets_of(dataset, dataset.validation) == plain("validation_gt")
    assert targets_of(dataset, dataset.test) == plain("test_gt")
    assert dataset.meta["split"]["cutoff_time"] == expected["cutoff"]
    counts = dataset.meta["counts"]
    assert counts["filtered_rows"] == expected["filtered_rows"]
    assert counts["filtered_users"] == expected["n_users"]
    assert counts["filtered_items"] == expected["n_items"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("times", [30, 100_000])
def test_global_split_equals_a_plain_reading_of_the_paper(tmp_path, seed, times):
    rows = random_rows(seed, times=times)
    assert_equals_oracle(prepare(source_of(rows), tmp_path / "out"), global_oracle(rows))


def test_late_user_is_no_test_user_but_counts_in_the_test_history_frame(tmp_path):
    rows = [(user, item, 100 * item + user) for user in range(40) for item in range(1, 9)]
    rows += [(99, item, 10_000 + item) for item in range(1, 9)]
    dataset = prepare(source_of(rows), tmp_path / "out")
    assert 99 not in dataset.user_ids[dataset.test.users]
    assert 99 in dataset.user_ids
    assert dataset.num_test_history_users == len(dataset.test) + 1
    assert_equals_oracle(dataset, global_oracle(rows))


def test_items_first_seen_after_the_cutoff_are_outside_the_catalog(tmp_path):
    rows = [(user, item, 100 * item + user) for user in range(40) for item in range(1, 9)]
    rows += [(user, 77, 10_000 + user) for user in range(6)]
    dataset = prepare(source_of(rows), tmp_path / "out")
    assert 77 not in dataset.item_ids
    assert dataset.meta["counts"]["filtered_items"] == 9
    assert dataset.num_items == 8


@pytest.mark.parametrize("memory_rows", [5, 1000])
def test_ties_keep_the_order_of_the_rows(tmp_path, memory_rows):
    items = [3, 1, 2, 5, 4]
    rows = [(user, item, 7) for item in items for user in range(30)]
    split = SplitOptions(kind="leave_one_out")
    dataset = prepare(
        source_of([*rows, *[(99, item, 7) for item in reversed(items)]]),
        tmp_path / "out",
        filters=NO_FILTER,
        split=split,
        memory_rows=memory_rows,
    )
    expected = [(user, item, 7) for user in range(30) for item in items[:3]]
    assert rows_of(dataset, dataset.train) == [*expected, (99, 4, 7), (99, 5, 7), (99, 2, 7)]
    assert dataset.meta["tied_target_share"] == {"validation": 1.0, "test": 1.0}


def test_leave_one_out(tmp_path):
    rows = [(1, 10, 1), (1, 11, 2), (1, 12, 3), (1, 13, 4)]
    rows += [(2, 13, 1), (2, 12, 1), (2, 11, 9), (2, 10, 5)]
    rows += [(3, 12, 7), (3, 10, 6)]
    rows += [(4, 11, 1), (4, 99, 2), (4, 10, 3)]
    dataset = prepare(
        source_of(rows),
        tmp_path / "out",
        filters=NO_FILTER,
        split=SplitOptions(kind="leave_one_out"),
    )
    assert Counter(rows_of(dataset, dataset.train)) == Counter(
        [(1, 10, 1), (1, 11, 2), (2, 13, 1), (2, 12, 1), (3, 10, 6), (3, 12, 7), (4, 11, 1)]
    )
    # 99 is in no training event: user 4 has no validation target, and is tested without it.
    assert targets_of(dataset, dataset.validation) == [(1, 12, 3), (2, 10, 5)]
    assert targets_of(dataset, dataset.test) == [(1, 13, 4), (2, 11, 9), (4, 10, 3)]
    assert rows_of(dataset, dataset.test)[-1] == (4, 11, 1)
    assert dataset.item_ids.tolist() == [10, 13, 12, 11]


@pytest.mark.parametrize("memory_rows", [1, 4, 1000])
def test_ties_by_the_age_of_items(tmp_path, memory_rows):
    # item 3 is the oldest, then 1 (by its time), then 5 before 2 (by their first rows)
    rows = [(1, 5, 9), (1, 2, 9), (1, 1, 9), (1, 3, 9), (2, 1, 5), (2, 3, 2), (2, 5, 9), (2, 2, 9)]
    rows += [(3, 2, 9), (3, 3, 9), (3, 1, 10), (3, 5, 10)]
    rows += [(4, 3, 40), (4, 2, 30), (4, 5, 20)]
    dataset = prepare(
        source_of(rows),
        tmp_path / "out",
        filters=NO_FILTER,
        split=SplitOptions(kind="leave_one_out", tie_order="item_age"),
        memory_rows=memory_rows,
    )
    histories = rows_of(dataset, dataset.test)
    assert histories[:3] == [(1, 3, 9), (1, 1, 9), (1, 5, 9)]
    assert histories[3:6] == [(2, 3, 2), (2, 1, 5), (2, 5, 9)]
    assert histories[6:] == [(3, 3, 9), (3, 2, 9), (3, 1, 10), (4, 5, 20), (4, 2, 30)]
    assert targets_of(dataset, dataset.test)[:3] == [(1, 2, 9), (2, 2, 9), (3, 5, 10)]
    assert dataset.meta["split"] == {"kind": "leave_one_out", "tie_order": "item_age"}


@pytest.mark.parametrize(("id_type", "by_id"), [("int", [8, 9, 10]), ("string", ["10", "8", "9"])])
def test_ties_by_the_ids_of_items(tmp_path, id_type, by_id):
    rows = [f"{user},{item},7" for user in (1, 2) for item in (9, 8, 10)]
    rows += ["3,9,1", "3,8,2", "3,10,3", "3,9,4", "3,8,5"]  # times go before ids
    file = tmp_path / "events.csv"
    file.write_text("\n".join(["user_id,item_id,timestamp", *rows]), encoding="utf-8")
    dataset = prepare(
        open_source("csv", file, SourceOptions(id_type=id_type)),
        tmp_path / "out",
        filters=NO_FILTER,
        split=SplitOptions(kind="leave_one_out", tie_order="item_id"),
        memory_rows=2,
    )
    for found, tied, timed in ((dataset.validation, by_id[1], 9), (dataset.test, by_id[2], 8)):
        targets = dict(
            zip(dataset.user_ids[found.users], dataset.item_ids[found.targets], strict=True)
        )
        assert [str(targets[user]) for user in dataset.user_ids] == [
            str(timed if str(user) == "3" else tied) for user in dataset.user_ids
        ]


@pytest.mark.parametrize("kind", ["global_temporal", "leave_one_out"])
@pytest.mark.parametrize("tie_order", ["row", "item_age", "item_id"])
@pytest.mark.parametrize("memory_rows", [7, 100, 1499])
def test_bounded_memory_changes_nothing(tmp_path, kind, tie_order, memory_rows):
    rows = random_rows(3, times=300)
    split = SplitOptions(kind=kind, tie_order=tie_order)
    whole = prepare(source_of(rows), tmp_path / "whole", split=split)
    parts = prepare(
        source_of(rows, chunk_rows=64), tmp_path / "parts", split=split, memory_rows=memory_rows
    )
    files = sorted(path.name for path in whole.path.iterdir())
    assert files == sorted(path.name for path in parts.path.iterdir())
    for name in set(files) - {"dataset.json"}:
        assert (whole.path / name).read_bytes() == (parts.path / name).read_bytes(), name
    assert {**whole.meta, "name": ""} == {**parts.meta, "name": ""}


def test_generated_data_in_files_equals_that_in_memory(tmp_path):
    events = generate(300, 400, 12, seed=5)
    whole = prepare(InteractionsSource(events), tmp_path / "whole")
    parts = prepare(InteractionsSource(events, chunk_rows=100), tmp_path / "p", memory_rows=200)
    assert whole.fingerprint == parts.fingerprint
    rows = list(zip(*(column.tolist() for column in vars(events).values()), strict=True))
    assert_equals_oracle(whole, global_oracle(rows))


def test_one_pass_filter_and_iterated_filter(tmp_path):
    rows = [(user, item, 100 * item + user) for user in range(30) for item in range(8)]
    # Item 50 has five rows, four of them of users that the user filter removes.
    rows += [(100 + k, 50, 40 + k) for k in range(4)] + [(0, 50, 60)]
    once = prepare(source_of(rows), tmp_path / "once")
    assert once.meta["counts"]["filtered_items"] == 9
    assert once.meta["counts"]["filtered_rows"] == 241
    again = prepare(source_of(rows), tmp_path / "again", filters=FilterOptions(iterated=True))
    assert again.meta["counts"]["filtered_items"] == 8
    assert again.meta["filter"]["iterated"] is True
    assert once.meta["filter"]["iterated"] is False


def test_ties_duplicates_and_repeats_are_recorded(tmp_path):
    rows = [(user, item, 100 * item + user) for user in range(40) for item in range(1, 12)]
    plain = prepare(source_of(rows), tmp_path / "plain")
    assert plain.meta["counts"]["num_duplicate_rows"] == 0
    assert plain.meta["tied_row_share"] == 0
    assert plain.meta["train_repeat_share"] == 0
    tester = int(plain.user_ids[plain.test.users[0]])
    more = [(tester, 1, 100 + tester)] * 2 + [(tester, 7, 1000 + tester)]
    twice = prepare(source_of([*rows, *more]), tmp_path / "twice")
    assert twice.meta["counts"]["num_duplicate_rows"] == 2
    assert twice.meta["counts"]["filtered_rows"] == 443
    assert tester in twice.user_ids[twice.test.users]
    assert twice.meta["tied_target_share"]["test"] == pytest.approx(1 / len(twice.test), abs=1e-6)
    train_rows = twice.meta["counts"]["train_rows"]
    assert twice.meta["train_repeat_share"] == pytest.approx(2 / train_rows, abs=1e-6)
    assert any("2 rows repeat another one" in warning for warning in twice.meta["warnings"])


def test_unknown_validation_user(tmp_path):
    rows = random_rows(1)
    with pytest.raises(DataError, match="validation user 4711 is not in the data"):
        prepare(source_of(rows), tmp_path / "out", validation_users=[1, 4711])


def test_user_with_half_of_the_data_is_warned_about(tmp_path):
    rows = [(user, item, 100 * item + user) for user in range(40) for item in range(5)]
    rows += [(7, k % 5, 13 * k % 500) for k in range(1, 201)]
    dataset = prepare(source_of(rows), tmp_path / "out")
    assert dataset.meta["largest_user_share"] == pytest.approx(205 / 400)
    (warning,) = [w for w in dataset.meta["warnings"] if "user 7 has" in w]
    assert "205 of 400 interactions (51%)" in warning


def test_nothing_left_by_the_filters(tmp_path):
    with pytest.raises(DataError, match=r"no interactions are left of 3 rows, 3 users and 3 items"):
        prepare(source_of([(1, 1, 1), (2, 2, 2), (3, 3, 3)]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_validation_users(tmp_path):
    rows = [(user, item, 100 * user + item) for user in range(6) for item in range(5)]
    with pytest.raises(DataError, match=r"no validation users of 6 users.*--validation-fraction"):
        prepare(source_of(rows), tmp_path / "out")


def test_all_rows_at_one_time(tmp_path):
    rows = [(user, item, 5) for user in range(9) for item in range(5)]
    with pytest.raises(DataError, match=r"no event lies before the cutoff at time 5"):
        prepare(source_of(rows), tmp_path / "out")


@pytest.mark.parametrize("name", ["test_fraction", "validation_fraction"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_shares_outside_their_range(name, value):
    with pytest.raises(DataError, match=f"{name}={value} is not between 0 and 1"):
        SplitOptions(**{name: value})


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_other_shares_move_the_cutoff(tmp_path, fraction):
    rows = random_rows(4, times=100_000)
    split = SplitOptions(test_fraction=fraction, validation_fraction=0.2)
    filters = FilterOptions(min_item_count=1, min_user_count=1)
    dataset = prepare(source_of(rows), tmp_path / "out", split=split, filters=filters)
    times = sorted(time for _, _, time in rows)
    assert dataset.meta["split"]["cutoff_time"] == times[int(len(times) * (1 - fraction))]


def test_fingerprint_is_pinned(tmp_path):
    """Runs are keyed by it: a change of rules or of format must change it on purpose."""
    rows = [(user, item, 100 * item + user) for user in range(30) for item in range(9)]
    dataset = prepare(source_of(rows), tmp_path / "out")
    expected = "b91e7d515d6aabe6524e6715e130491240dea873c4bba464340b348ef1572411"
    assert dataset.fingerprint == expected


def test_progress_is_told(tmp_path):
    told = []
    prepare(source_of(random_rows(1), chunk_rows=600), tmp_path / "out", progress=told.append)
    assert told[:3] == ["read 600 rows", "read 1,200 rows", "read 1,500 rows"]
    assert [line.split()[0] for line in told[3:]] == ["filter", "split", "sort"]


def test_output_folder_is_never_half_written(tmp_path):
    rows = random_rows(1)
    first = prepare(source_of(rows), tmp_path / "out")
    with pytest.raises(DataError, match="out exists; choose another --out or pass --overwrite"):
        prepare(source_of(rows), tmp_path / "out")
    with pytest.raises(DataError, match="no interactions are left"):
        prepare(source_of(rows[:3]), tmp_path / "out", overwrite=True)
    assert load_dataset(tmp_path / "out").fingerprint == first.fingerprint
    second = prepare(source_of(random_rows(2)), tmp_path / "out", overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(DataError, match="mine is not a prepared dataset"):
        prepare(source_of(rows), tmp_path / "mine", overwrite=True)
