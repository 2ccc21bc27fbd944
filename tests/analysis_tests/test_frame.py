import numpy as np
import pandas as pd
import pytest

from analysis.frame import comparable, parameter_frame, point_labels, same_memory, select
from db.errors import AnalysisError


def test_a_missing_column_is_named(sweep_frame):
    with pytest.raises(AnalysisError, match="lacks batch_size, status"):
        select(sweep_frame().drop(columns=["batch_size", "status"]))


def test_text_in_a_number_is_shown_with_its_run(sweep_frame):
    frame = sweep_frame().astype({"ndcg_at_10": object})
    frame.loc[3, "ndcg_at_10"] = "n/a?"
    with pytest.raises(AnalysisError, match=r"ndcg_at_10='n/a\?' of run 000000000000 is not a"):
        select(frame)


def test_infinite_values_count_as_missing_and_are_counted(sweep_frame):
    frame = sweep_frame()
    frame.loc[:1, "ndcg_at_10"] = np.inf
    runs = select(frame)
    assert runs.frame["ndcg_at_10"].isna().sum() == 2
    assert "2 infinite values of ndcg_at_10 count as missing." in runs.notes


@pytest.mark.parametrize(
    ("rows", "message"),
    [(slice(0, 4), "mixes units: 5 of 24 values"), (slice(None), "look like GiB or MiB")],
)
def test_memory_in_another_unit_is_refused(sweep_frame, rows, message):
    frame = sweep_frame()
    frame.loc[rows, "peak_train_memory_bytes"] /= 2**30
    with pytest.raises(AnalysisError, match=message):
        select(frame)


def test_runs_that_did_not_fit_are_kept_apart(sweep_frame):
    frame = sweep_frame()
    frame.loc[0, "status"] = "out_of_memory"
    frame.loc[1, "status"] = "skipped"
    frame.loc[2, "status"] = "diverged"
    runs = select(frame)
    assert (len(runs.frame), len(runs.infeasible)) == (21, 2)
    assert "1 runs with status diverged take no part." in runs.notes


def test_equal_names_from_two_sources_are_told_apart(sweep_frame):
    both = pd.concat([sweep_frame(), sweep_frame().assign(source="theirs")], ignore_index=True)
    assert select(both).datasets == ["demo [own]", "demo [theirs]"]


def test_only_the_most_frequent_setting_is_compared(sweep_frame):
    frame = sweep_frame().assign(learning_rate=1e-3)
    frame.loc[:4, "learning_rate"] = 1e-2
    kept, notes = comparable(frame)
    assert len(kept) == 19
    assert "5 of 24 runs differ in another setting" in notes[0]


def test_other_losses_are_left_out_beside_a_softmax(sweep_frame):
    frame = sweep_frame()
    frame.loc[:2, "loss"] = "bce_plus"
    frame.loc[3, "loss"] = "cce"
    assert set(comparable(frame)[0]["loss"]) == {"ce", "ce_minus", "cce"}


def test_memory_of_one_device_class_is_compared(sweep_frame):
    frame = sweep_frame()
    frame.loc[:2, "device_class"] = "cuda H100"
    kept, notes = same_memory(frame)
    assert set(kept["device_class"]) == {"cpu"}
    assert "3 of 24 runs were measured elsewhere" in notes[0]


def test_products_are_missing_where_a_factor_is(sweep_frame):
    found = parameter_frame(sweep_frame())
    full = found["num_negatives"].isna()
    assert full.sum() == 6
    assert found.loc[full, "num_negatives*batch_size"].isna().all()
    assert found.loc[full, "max_seq_len*batch_size"].notna().all()


def test_catalog_size_is_needed_for_vocabulary(sweep_frame):
    with pytest.raises(AnalysisError, match="needs num_items of every dataset"):
        parameter_frame(sweep_frame().drop(columns="num_items"), "vocabulary")


def test_seeds_share_a_point(sweep_frame):
    frame = sweep_frame(seeds=(1, 2, 3))
    assert point_labels(frame).value_counts().unique().tolist() == [3]


def test_a_setting_tied_to_a_parameter_keeps_all_runs_and_is_said(sweep_frame):
    frame = sweep_frame()
    frame["evaluate_every_steps"] = 4096 / frame["batch_size"]
    alike, notes = comparable(frame)
    assert len(alike) == len(frame)
    assert notes == (
        "demo: evaluate_every_steps is set by batch_size in these runs; what is said of "
        "batch_size is said of both.",
    )
    frame["learning_rate"] = [1e-3, 1e-3, 1e-4] * (len(frame) // 3)
    alike, notes = comparable(frame)
    assert set(alike["learning_rate"]) == {1e-3}
    assert "8 of 24 runs differ in another setting" in notes[-1]
