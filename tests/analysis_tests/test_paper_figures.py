"""The published figures, recovered from the published runs."""

import pandas as pd
import pytest
from scipy import stats

from analysis.association import associations
from analysis.frame import PARAMETERS, QUALITY, comparable, select
from analysis.importance import importances
from analysis.pareto import pareto_fronts

pytestmark = pytest.mark.shared

PRINTED = {
    "zvuk": (0.61, 0.39, 0.03),
    "megamarket": (-0.05, 0.90, -0.04),
    "30music": (0.38, 0.66, 0.02),
    "beauty": (0.39, 0.72, 0.02),
    "gowalla": (-0.02, 0.88, 0.26),
    "movielens_20m": (0.15, 0.35, 0.47),
}
FIGURE_7B = {
    "ndcg_at_10": (0.023, 0.298, 0.036, 0.493, 0.048, 0.104),
    "coverage_at_10": (0.017, 0.522, 0.017, 0.215, 0.046, 0.182),
    "surprisal_at_10": (0.061, 0.128, 0.072, 0.290, 0.119, 0.329),
}


def _alike(frame: pd.DataFrame) -> pd.DataFrame:
    return comparable(select(frame).frame)[0]


def test_the_selection_keeps_the_rows_of_the_papers_figures(paper_frame):
    runs = select(paper_frame)
    assert runs.frame.groupby("dataset").size().to_dict() == {
        "zvuk": 213, "megamarket": 222, "30music": 216, "beauty": 286, "gowalla": 250,
        "movielens_20m": 242,
    }  # fmt: skip
    assert any("128 published runs with 1,512 or 1,536 negatives" in note for note in runs.notes)
    assert len(select(paper_frame, selection="all").frame) == 1557


def test_figure_7a_all_108_correlations(paper_frame):
    alike = _alike(paper_frame)
    found = associations(alike, resamples=200)
    assert len(found.rows) == 108
    by_pair = {(row.dataset, row.metric, row.parameter): row for row in found.rows}
    for dataset, printed in PRINTED.items():
        rows = [by_pair[dataset, "ndcg_at_10", name] for name in PARAMETERS[:3]]
        assert [round(row.coefficient, 2) for row in rows] == list(printed), dataset
    for (dataset, metric, parameter), row in by_pair.items():
        group = alike[alike["dataset"] == dataset]
        x = group[parameter.split("*")].prod(axis=1, skipna=False)
        both = x.notna()
        expected = stats.spearmanr(x[both], group.loc[both, metric]).statistic
        assert row.coefficient == pytest.approx(expected, abs=1e-12)
        assert row.low <= row.coefficient <= row.high
        assert row.n == both.sum()


def test_repeats_move_some_correlations_in_the_second_decimal(paper_frame):
    published = associations(_alike(paper_frame), resamples=200).to_frame()
    once = comparable(select(paper_frame, repeats="without").frame)[0]
    alone = associations(once, resamples=200).to_frame()
    moved = published["coefficient"].round(2) != alone["coefficient"].round(2)
    assert moved.sum() == 35
    row = (alone["dataset"] == "megamarket") & (alone["metric"] == "ndcg_at_10")
    value = alone.loc[row & (alone["parameter"] == "num_negatives"), "coefficient"].item()
    assert round(value, 2) == 0.05


def test_figure_7b_all_18_mean_importances(paper_frame):
    found = importances(_alike(paper_frame), methods=["impurity"], forests=1).to_frame()
    mean = found[found["dataset"] == "mean"].set_index(["metric", "parameter"])["importance"]
    for metric, expected in FIGURE_7B.items():
        for parameter, value in zip(PARAMETERS, expected, strict=True):
            assert mean[metric, parameter] == pytest.approx(value, abs=1e-3)
    assert len(mean) == 3 * len(PARAMETERS)
    assert tuple(dict.fromkeys(found["metric"])) == QUALITY


def test_surprisal_importances_rest_on_a_model_that_does_not_predict(paper_frame):
    alike = _alike(paper_frame)
    beauty = alike[alike["dataset"] == "beauty"]
    found = importances(
        beauty, metrics=["surprisal_at_10"], methods=["impurity", "permutation"], repeats=1,
        permutations=1, forests=1,
    )  # fmt: skip
    scores = {score.scheme: score.r2 for score in found.scores}
    assert scores["in_sample"] == pytest.approx(0.82, abs=0.005)
    assert scores["kfold"] == pytest.approx(-0.06, abs=0.005)
    assert not any(row.predicts for row in found.rows)


def test_pareto_fronts_of_the_released_csv(shared, tmp_path):
    from db.query import summary_frame
    from db.transfer_paper import import_paper

    url = f"sqlite:///{tmp_path}/csv.db"
    counts, _ = import_paper(url, shared / "paper" / "experiments.csv")
    assert counts.new == 997
    fronts = pareto_fronts(select(summary_frame(url), selection="all").frame)
    assert {front.dataset: len(front.runs) for front in fronts} == {
        "zvuk": 18, "megamarket": 21, "30music": 17, "beauty": 13, "gowalla": 25,
        "movielens_20m": 11,
    }  # fmt: skip
