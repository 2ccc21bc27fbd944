import json

import pandas as pd
import pytest

from analysis.cache import content_key
from analysis.report import ReportOptions, report_of_frame
from db.errors import AnalysisError

CHEAP = ReportOptions(metrics=("ndcg_at_10",), resamples=200, fold_repeats=1, jobs=1)
CSV_COLUMNS = {
    "associations": "dataset metric parameter coefficient low high p_value q_value n",
    "importances": "dataset metric parameter method importance low high score_in_sample "
    "score_out_of_sample",
    "pareto": "dataset run_key peak_train_memory_bytes ndcg_at_10",
    "findings": "claim dataset verdict value low high n",
}


@pytest.fixture(scope="module")
def small(sweep_frame, tmp_path_factory):
    frame = sweep_frame()
    frame.loc[0, "status"] = "out_of_memory"
    frame.loc[0, "ndcg_at_10"] = float("nan")
    frame["memory_bound_bytes"] = [9e9] + [float("nan")] * 23
    out = tmp_path_factory.mktemp("report")
    return frame, report_of_frame(frame, out, options=CHEAP)


def test_fixed_files_and_columns(small):
    _, report = small
    for name, columns in CSV_COLUMNS.items():
        table = pd.read_csv(report.folder / f"{name}.csv")
        assert list(table) == columns.split(), name
        assert len(table), name
    assert set(pd.read_csv(report.folder / "findings.csv")["verdict"]) <= {
        "supported", "contradicted", "undecidable",
    }  # fmt: skip
    stems = {path.stem for path in (report.folder / "figures").iterdir()}
    for stem in stems:
        for suffix in ("svg", "png", "csv"):
            assert (report.folder / "figures" / f"{stem}.{suffix}").stat().st_size > 0
    assert {"tradeoff_memory_ndcg_at_10", "negatives_ndcg_at_10", "associations_heatmap"} <= stems


def test_the_page_is_one_file_without_outside_addresses(small):
    _, report = small
    text = report.index.read_text()
    assert report.index.stat().st_size < 8e6
    page = text[: text.index('<script id="data"')]
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<h2") >= 5
    data = text.split('<script id="data" type="application/json">')[1].split("</script>")[0]
    rows = json.loads(data)
    assert len(rows["columns"]["key"]) == 24
    assert rows["columns"]["status"].count("out_of_memory") == 1


def test_equal_input_gives_equal_bytes_and_is_not_computed_twice(small, tmp_path):
    frame, report = small
    again = report_of_frame(frame, report.folder, options=CHEAP)
    assert again.unchanged
    assert again.computed == []
    elsewhere = report_of_frame(frame, tmp_path / "second", options=CHEAP)
    for path in report.files:
        twin = elsewhere.folder / path.relative_to(report.folder)
        assert path.read_bytes() == twin.read_bytes(), path.name


def test_a_damaged_figure_is_drawn_again_from_kept_results(small):
    frame, report = small
    victim = report.folder / "figures" / "associations_heatmap.png"
    whole = victim.read_bytes()
    victim.write_bytes(b"")
    again = report_of_frame(frame, report.folder, options=CHEAP)
    assert not again.unchanged
    assert again.computed == []
    assert victim.read_bytes() == whole


def test_another_value_is_another_key(sweep_frame):
    frame = sweep_frame()
    changed = frame.copy()
    changed.loc[5, "ndcg_at_10"] += 1e-9
    assert content_key(frame) == content_key(frame.copy())
    assert content_key(frame) != content_key(changed)
    assert content_key(frame, 1) != content_key(frame, 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: f.head(3), "3 points are too few for a rank correlation"),
        (lambda f: f.assign(ndcg_at_10=0.1), "ndcg_at_10 is constant"),
        (lambda f: f.assign(batch_size=64, max_seq_len=16).head(4), "never varies"),
        (lambda f: f[f["num_negatives"].isna()], "no run has both ndcg_at_10 and num_negatives"),
        (
            lambda f: f.assign(peak_train_memory_bytes=float("nan")),
            "24 of 24 runs have no peak_train_memory_bytes or ndcg_at_10",
        ),
    ],
)
def test_what_the_runs_lack_is_said_in_the_report(sweep_frame, tmp_path, change, sentence):
    report = report_of_frame(change(sweep_frame()), tmp_path, options=CHEAP)
    assert sentence in report.index.read_text()
    assert (tmp_path / "findings.csv").exists()


def test_nothing_finished_is_refused(sweep_frame, tmp_path):
    frame = sweep_frame().assign(status="out_of_memory")
    with pytest.raises(AnalysisError, match="no finished run to report on; 24 ran out of memory"):
        report_of_frame(frame, tmp_path, options=CHEAP)
