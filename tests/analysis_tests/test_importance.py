import numpy as np
import pytest

from analysis.frame import FACTORS
from analysis.importance import METHODS, importances

CHEAP = {"metrics": ["ndcg_at_10"], "methods": ["impurity", "permutation"], "repeats": 1,
         "permutations": 1, "forests": 1}  # fmt: skip


def _grid(sweep_frame, quality, **options):
    return sweep_frame(
        batch_sizes=(16, 32, 64, 128), lengths=(16, 32, 64), negatives=(8, 16, 32, 64),
        quality=quality, **options,
    )  # fmt: skip


def test_the_parameter_that_matters_is_found_by_every_method(sweep_frame):
    frame = _grid(sweep_frame, lambda bs, sl, ns: 0.02 * np.log2(bs))
    found = importances(frame, metrics=["ndcg_at_10"], repeats=1, permutations=3)
    table = found.to_frame().query("dataset == 'demo'")
    assert set(table["method"]) == set(METHODS)
    for method in ("permutation_grouped", "fanova", "ped_anova"):
        rows = table[table["method"] == method].set_index("parameter")["importance"]
        assert rows.idxmax() == "batch_size", method
        assert set(rows.index) == set(FACTORS)
    assert table["score_out_of_sample"].iloc[0] > 0.9
    assert all(row.predicts for row in found.rows)
    schemes = {score.scheme for score in found.scores}
    assert schemes == {"in_sample", "kfold", "kfold_by_point", "leave_one_batch_size_out"}


def test_noise_is_shown_as_a_model_that_does_not_predict(sweep_frame):
    frame = _grid(sweep_frame, lambda bs, sl, ns: 0.1, noise=0.01)
    found = importances(frame, **CHEAP)
    assert found.rows[0].score_in_sample > 0.5
    assert found.rows[0].score_out_of_sample <= 0
    assert not any(row.predicts for row in found.rows)


def test_repeats_leak_between_folds_of_runs_but_not_of_points(sweep_frame):
    frame = _grid(sweep_frame, lambda bs, sl, ns: 0.1, noise=0.01)
    twice = frame.loc[frame.index.repeat(3)].reset_index(drop=True)
    found = importances(twice, **CHEAP)
    scores = {score.scheme: score.r2 for score in found.scores}
    assert scores["kfold"] > 0.5
    assert scores["kfold_by_point"] < 0.1


def test_encodings_are_named(sweep_frame):
    frame = _grid(sweep_frame, lambda bs, sl, ns: 0.01 * np.log2(bs * ns))
    found = importances(frame, metrics=["ndcg_at_10"], repeats=1, permutations=1)
    assert set(found.encodings["encoding"]) == {"log", "categorical"}
    assert found.encodings.query("shown")["encoding"].unique().tolist() == ["log"]


def test_too_few_points_and_fixed_parameters_are_said(sweep_frame):
    few = importances(sweep_frame().head(9), metrics=["ndcg_at_10"])
    assert few.rows == ()
    assert "points with ndcg_at_10 and a number of negatives are too few" in few.notes[0]
    fixed = sweep_frame(batch_sizes=(64,), lengths=(8, 16, 32, 64), negatives=(8, 64, 512))
    found = importances(fixed, **CHEAP)
    assert any("batch_size never varies (it is 64)" in note for note in found.notes)
    constant = importances(_grid(sweep_frame, lambda *_: 0.1, noise=0.0), metrics=["ndcg_at_10"])
    assert "ndcg_at_10 is constant (0.1), nothing to model" in constant.notes[0]


def test_processes_do_not_change_the_numbers(sweep_frame, monkeypatch):
    monkeypatch.setattr("analysis.importance._WORTH_PROCESSES", 0)
    frame = _grid(sweep_frame, lambda bs, sl, ns: 0.02 * np.log2(bs))
    alone, together = (
        importances(frame, metrics=["ndcg_at_10"], methods=["impurity"], forests=2, jobs=jobs)
        for jobs in (1, 2)
    )
    assert alone.rows == together.rows
    assert [row.importance for row in alone.rows[:6]] == pytest.approx(
        [row.importance for row in together.rows[:6]]
    )
