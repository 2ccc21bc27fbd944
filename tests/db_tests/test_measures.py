"""Measures: every column of a result is named, shown and defined."""

import dataclasses

import pytest

from db.measures import (
    KS,
    MEASURES,
    METRIC_COLUMNS,
    METRICS,
    SELECTION_K,
    SELECTION_METRIC,
    RunResult,
    StepRecord,
    metric_column,
)
from db.rows import STEP_COLUMNS, evaluation_row, real, step_row, whole
from db.schema import evaluations, run_summary, steps


def test_metric_columns_are_all_metrics_at_all_cut_offs():
    assert len(METRIC_COLUMNS) == len(METRICS) * len(KS) == len(set(METRIC_COLUMNS))
    assert metric_column(SELECTION_METRIC, SELECTION_K) == "ndcg_at_10"
    assert set(METRIC_COLUMNS) < set(MEASURES)


def test_every_measure_is_a_column_of_the_summary():
    assert set(MEASURES) <= {column.name for column in run_summary.c}
    for column in METRIC_COLUMNS:
        for name in (f"{column}_se", f"validation_{column}", f"validation_{column}_se"):
            assert name in run_summary.c


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda m: m.name)
def test_measures_are_fit_for_display(measure):
    assert measure.definition
    assert measure.display_scale > 0
    assert measure.unit in {"", "byte", "second", "1/second"}
    assert measure.unit == "" or measure.unit.split("/")[-1] in measure.name


def test_memory_and_time_are_minimised_and_metrics_maximised():
    for measure in MEASURES.values():
        costs = measure.unit in {"byte", "second"}
        assert measure.maximise is not costs


def test_every_number_of_a_result_is_stored():
    special = {"test", "validation"}
    fields = {field.name for field in dataclasses.fields(RunResult)} - special
    assert fields <= {column.name for column in run_summary.c}


def test_every_field_of_a_step_is_stored_in_order():
    assert tuple(field.name for field in dataclasses.fields(StepRecord)) == STEP_COLUMNS
    assert [column.name for column in steps.c] == ["attempt_id", *STEP_COLUMNS]


def test_rows_match_their_columns(step, evaluation):
    assert step_row(step(3))[:3] == (3, 0, 0.25)
    (first, *_) = evaluation(20)
    row = dict(zip([c.name for c in evaluations.c][1:], evaluation_row(first), strict=True))
    assert (row["split"], row["metric"], row["k"], row["step"], row["epoch"]) == (
        "validation", "ndcg", 1, 20, 2,
    )  # fmt: skip
    assert (row["value"], row["standard_error"], row["num_users"]) == (0.25, 0.01, 20)


def test_only_finite_numbers_are_real():
    assert [real(v) for v in (None, float("nan"), float("inf"), -float("inf"), 1)] == [
        None, None, None, None, 1.0,
    ]  # fmt: skip
    assert whole(None) is None
    with pytest.raises(TypeError):
        whole(1.0)
