"""The numbers behind each figure, and that what is missing is said in words."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.claims_losses import filtering
from analysis.frame import MEMORY, TIME
from analysis.plots.curves import curves_figure
from analysis.plots.filtering import filtering_data, filtering_figures
from analysis.plots.gradients import gradients_figure
from analysis.plots.losses import losses_data, losses_figure
from analysis.plots.style import facets, log_if_wide
from analysis.plots.tradeoff import tradeoff_data, tradeoff_figure
from analysis.traces import (
    CURVE_COLUMNS,
    HISTOGRAM_COLUMNS,
    chosen_runs,
    curves,
    gradient_histograms,
)
from db.imported import ForeignRun, put_foreign
from db.query import summary_frame
from db.spec import RunSpec
from db.store import DatasetRecord


def _texts(drawing):
    return [text.get_text().replace("\n", " ") for axis in drawing.figure.axes
            for text in axis.texts]  # fmt: skip


@pytest.fixture
def database(tmp_path):
    """Two runs with curves, one of them with histograms of gradients."""
    spec = RunSpec(dataset="ml", loss="ce_minus", num_negatives=8, precision="fp32")
    other = RunSpec(dataset="ml", precision="fp32")
    runs = [
        ForeignRun(
            spec=item, fingerprint="b" * 64, source="own", device_class="cpu",
            summary={"ndcg_at_10": quality, MEMORY: memory, "memory_source": "resident"},
            curve=[(step, step // 500, 8 - step / 500) for step in range(1000)],
        )
        for item, quality, memory in ((spec, 0.1, 1e9), (other, 0.2, 2e9))
    ]  # fmt: skip
    url = f"sqlite:///{tmp_path}/runs.db"
    put_foreign(url, "s", "", [DatasetRecord(name="ml", fingerprint="b" * 64)], runs)
    return url


def test_curves_are_means_over_bins_of_the_steps_in_the_database(database):
    frame = summary_frame(database)
    found = curves(database, chosen_runs(frame))
    assert list(found) == list(CURVE_COLUMNS)
    assert found.groupby("run_key").size().tolist() == [200, 200]
    assert set(found["label"]) == {"ce_minus · bs 128 · sl 200 · ns 8", "ce · bs 128 · sl 200"}
    first = found.iloc[0]
    assert (first["step"], first["loss"]) == (4, pytest.approx(8 - 2 / 500))
    drawing = curves_figure(found)
    assert not drawing.said
    assert len(drawing.figure.axes[0].lines) == 2
    missing = curves_figure(found, "ndcg_at_10")
    assert missing.said
    assert _texts(missing) == ["No run has recorded its validation ndcg@10 by step."]


def test_gradients_are_the_first_and_last_histogram_of_a_run(database):
    import sqlite3

    frame = summary_frame(database)
    assert list(gradient_histograms(database, frame)) == list(HISTOGRAM_COLUMNS)
    edges = json.dumps([0.0, 1e-6, 1e-3, 1.0])
    with sqlite3.connect(database.removeprefix("sqlite:///")) as connection:
        connection.executemany(
            "insert into histograms (attempt_id, name, step, edges, counts) values (1, ?, ?, ?, ?)",
            [("logit_gradient", step, edges, json.dumps([step, 1, 2])) for step in (0, 5, 9)],
        )
    connection.close()
    found = gradient_histograms(database, frame)
    assert sorted(set(found["step"])) == [0, 9]
    assert found[found["step"] == 9]["share"].tolist() == pytest.approx([9 / 12, 1 / 12, 2 / 12])
    drawing = gradients_figure(found)
    assert len(drawing.figure.axes) == 1
    legend = drawing.figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "step 0", "step 9", "  75.0% below the first bin",
    ]  # fmt: skip
    assert gradients_figure(found.head(0)).said


def test_losses_are_compared_at_their_best_mean_over_seeds(sweep_frame):
    frame = sweep_frame(seeds=(1, 2))
    data = losses_data(frame)
    assert data["loss"].tolist() == ["ce", "ce_minus"]
    sampled = data.iloc[1]
    same = frame[frame["num_negatives"] == sampled["num_negatives"]]
    same = same[(same["batch_size"] == sampled["batch_size"])
                & (same["max_seq_len"] == sampled["max_seq_len"])]  # fmt: skip
    means = frame[frame["loss"] == "ce_minus"].groupby(
        ["batch_size", "max_seq_len", "num_negatives"]
    )
    assert sampled["ndcg_at_10"] == pytest.approx(means["ndcg_at_10"].mean().max())
    assert sampled[MEMORY] == pytest.approx(same[MEMORY].mean())
    assert (sampled["num_runs"], sampled["num_points"]) == (2, 18)
    assert not losses_figure(frame).said
    alone = losses_figure(frame[frame["loss"] == "ce"])
    assert alone.said
    assert "has runs of several; here: ce." in alone.caption


def test_filtering_takes_the_setting_with_the_most_thresholds():
    rows = [
        {"run_key": str(number), "dataset": "demo", "model": "sasrec", "loss": loss,
         "batch_size": 64, "max_seq_len": length, "num_negatives": negatives, "filter_eps": eps,
         "ndcg_at_10": 0.1 - (eps or 0), TIME: 5.0 - 10 * (eps or 0)}
        for number, (loss, length, negatives, eps) in enumerate([
            ("cce", 16, np.nan, None), ("cce", 16, np.nan, 1e-4), ("cce", 16, np.nan, 1e-2),
            ("cce", 32, np.nan, None), ("cce_minus", 16, 128, None), ("cce_minus", 32, 128, None),
        ])
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    data = filtering_data(frame)
    assert set(data["max_seq_len"]) == {16}
    assert data[data["loss"] == "cce"]["filter_eps"].tolist() == [0.0, 1e-4, 1e-2]
    assert data[data["loss"] == "cce"][TIME].tolist() == pytest.approx([5, 4.999, 4.9])
    line, scatter = filtering_figures(frame)
    assert [item.get_text() for item in line.figure.axes[0].get_xticklabels()] == [
        "none", "1e-4", "1e-2",
    ]  # fmt: skip
    assert {"none", "1e-4", "1e-2", "ns 128"} <= set(_texts(scatter))
    assert all(drawing.said for drawing in filtering_figures(frame[frame["loss"] != "cce"]))


def test_runs_trained_otherwise_are_not_averaged():
    rows = [
        {"run_key": str(number), "dataset": "demo", "loss": "cce", "batch_size": 64,
         "max_seq_len": 16, "num_negatives": np.nan, "filter_eps": eps, "filter_mode": mode,
         "max_epochs": epochs, "ndcg_at_10": ndcg, TIME: 5.0, MEMORY: 1e6}
        for number, (epochs, eps, mode, ndcg) in enumerate([
            (2, None, "drop", 0.10), (2, 1e-4, "drop", 0.05), (2, 1e-4, "unbiased", 0.11),
            (20, None, "drop", 0.30),
        ])
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    data = filtering_data(frame)
    assert data["ndcg_at_10"].tolist() == pytest.approx([0.10, 0.05])
    best = losses_data(frame).iloc[0]
    assert best["ndcg_at_10"] == pytest.approx(0.30)
    assert (best["num_runs"], best["num_points"]) == (1, 4)
    (finding,) = filtering(frame)
    assert finding.value == pytest.approx(-0.5)


def test_the_papers_selection_of_figure_5_is_an_option_that_says_what_it_hides(sweep_frame):
    frame = sweep_frame(datasets=("zvuk", "demo"))
    frame[MEMORY] = 51.0 * 2**30
    frame.loc[frame.index[:7], "ndcg_at_10"] = 0.06
    frame.loc[frame.index[7:24], "ndcg_at_10"] = 0.04
    everything = tradeoff_figure(tradeoff_data(frame))
    assert len(everything.data) == 48
    assert "No run is hidden." in everything.caption
    some = tradeoff_figure(tradeoff_data(frame, hidden="paper"))
    assert len(some.data) == 41
    assert "7 runs are hidden, as far as the boxes of the paper's Fig. 5 are known (zvuk: 7)." in (
        some.caption
    )
    assert "No run is hidden" not in some.caption


@pytest.mark.parametrize(
    ("low", "high", "columns", "expected"),
    [
        (1, 20, 1, (1, 2, 5, 10, 20)),
        (0.01, 2, 3, (0.01, 0.1, 1)),
        (40, 5000, 2, (100, 300, 1000, 3000)),
        (40, 5000, 3, (100, 1000)),
    ],
)
def test_ticks_of_a_logarithmic_axis_keep_apart(low, high, columns, expected):
    _, axes = facets([str(number) for number in range(columns)])
    axes[0].plot([low, high], [0, 1])
    log_if_wide(axes[0], pd.Series([low, high]))
    inside = [tick for tick in axes[0].get_xticks() if low <= tick <= high]
    assert inside == pytest.approx(list(expected))
