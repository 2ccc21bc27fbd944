import pandas as pd
import pytest

from analysis.plots.equal_budget import equal_budget, equal_budget_figure

MEMORY = "peak_train_memory_bytes"


def runs():
    rows = [
        ("a", "ce", 4, 0.10), ("a", "ce", 8, 0.12), ("a", "ce", 9, 0.11),
        ("a", "cce", 2, 0.08), ("a", "cce", 5, 0.15), ("a", "cce", 7, None),
        ("b", "ce", 3, 0.30),
    ]  # fmt: skip
    return pd.DataFrame(
        [
            {"run_key": f"k{i}", "dataset": d, "loss": loss, MEMORY: gib * 2**30,
             "epoch_seconds": 10.0 - gib, "ndcg_at_10": quality, "batch_size": 32,
             "max_seq_len": 8, "num_negatives": None}
            for i, (d, loss, gib, quality) in enumerate(rows)
        ]
    )  # fmt: skip


def test_each_loss_rises_only_where_a_better_run_comes_within_reach():
    data = equal_budget(runs())
    assert list(data.steps["run_key"]) == ["k0", "k1", "k3", "k4", "k6"]
    assert data.ends == {"a": 9 * 2**30, "b": 3 * 2**30}
    assert data.note == "1 of 7 runs have no peak_train_memory_bytes or ndcg_at_10."


def test_gains_are_over_the_best_other_loss_within_the_same_budget():
    steps = equal_budget(runs()).steps.set_index("run_key")["gain"]
    assert steps["k0"] == pytest.approx(0.10 / 0.08 - 1)
    assert steps["k1"] == pytest.approx(0.12 / 0.15 - 1)
    assert steps["k4"] == pytest.approx(0.15 / 0.10 - 1)
    assert pd.isna(steps["k3"])
    assert pd.isna(steps["k6"])


def test_equal_time_is_another_cost():
    data = equal_budget(runs(), cost="epoch_seconds")
    assert list(data.steps["run_key"]) == ["k2", "k1", "k4", "k6"]


def test_the_figure_has_a_panel_per_dataset_and_a_staircase_per_loss():
    drawing = equal_budget_figure(equal_budget(runs()))
    assert drawing.name == "equal_budget_peak_train_memory_bytes_ndcg_at_10"
    assert [axis.get_title() for axis in drawing.figure.axes] == ["a", "b"]
    assert len(drawing.figure.axes[0].lines) == 4
    assert "Peak training memory" in drawing.caption


def test_a_database_without_the_measures_says_so():
    drawing = equal_budget_figure(equal_budget(runs().assign(ndcg_at_10=None)))
    assert drawing.said
    assert "7 of 7 runs" in drawing.caption
