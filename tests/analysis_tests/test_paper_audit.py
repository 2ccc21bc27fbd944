"""The numbers of docs/paper-audit.md, held against the code that prints them."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import claims_losses, claims_scaling
from analysis.audit import contradictions, denominators, hidden_points, memory_out_of_order, repeats
from analysis.frame import comparable, records, select
from analysis.importance import model_scores
from analysis.tables import beside_the_paper, printed_twice

PAGE = Path(__file__).parents[2] / "docs" / "paper-audit.md"
MARK = {"supported": "yes", "contradicted": "no", "undecidable": "open"}


def _table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture(scope="module")
def published(paper_frame: pd.DataFrame) -> pd.DataFrame:
    return select(paper_frame).frame


@pytest.fixture(scope="module")
def everything(paper_frame: pd.DataFrame) -> pd.DataFrame:
    return select(paper_frame, selection="all").frame


@pytest.mark.shared
def test_repeats(everything, published):
    found = {row["dataset"]: row for row in records(repeats(everything))}
    shown = published.groupby("dataset").size()
    table = _table("Repeats")
    assert len(table) == 6
    for dataset, runs, in_figures, points, again, memory, _ in table:
        row = found[dataset]
        assert [int(runs), int(points), int(again)] == [row["runs"], row["points"], row["repeats"]]
        assert int(in_figures) == shown[dataset]
        if memory != "–":
            assert memory == f"{100 * row['largest_spread_memory']:.0f} %"
    assert sum(int(row[4]) for row in table) == 34


@pytest.mark.shared
def test_memory_that_a_run_did_not_use(everything):
    found = {row["dataset"]: row for row in records(memory_out_of_order(everything))}
    table = _table("Memory that a run did not use")
    for dataset, _, *counts, ratio, rho, in_order in table:
        row = found[dataset]
        names = ("out_of_order", "fewest_negatives", "after_short", "follow_short")
        assert [int(count) for count in counts] == [row[name] for name in names]
        assert ratio == f"{1 + row['largest_excess']:.1f}"
        assert [rho, in_order] == [
            f"{row['spearman_all']:.2f}", f"{row['spearman_in_order']:.2f}",
        ]  # fmt: skip
    assert sum(int(row[2]) for row in table) == 109
    assert [sum(int(row[column]) for row in table) for column in (3, 4, 5)] == [106, 106, 126]


@pytest.mark.shared
def test_hidden_points(published):
    found = [[str(cell) for cell in row.values()] for row in records(hidden_points(published))]
    assert sorted(_table("Points hidden in Fig. 5")) == sorted(found)


@pytest.mark.shared
def test_fit_in_and_out_of_sample(published):
    alike = comparable(published)[0]
    found = {
        (score.dataset, score.scheme): f"{score.r2:.2f}"
        for score in model_scores(alike, metrics=["surprisal_at_10"])
    }
    for dataset, *cells in _table("R² of the random forest"):
        assert cells[4:] == [found[dataset, "in_sample"], found[dataset, "kfold"]], dataset


@pytest.mark.shared
def test_claims_that_need_no_model(published):
    alike = comparable(published)[0]
    found = [
        *claims_scaling.growth(alike), *claims_scaling.negatives(alike),
        *claims_scaling.batch_size(alike), *claims_scaling.sequence_length(alike),
        *claims_scaling.two_together(alike),
    ]  # fmt: skip
    text = PAGE.read_text(encoding="utf-8")
    head = next(line for line in text.splitlines() if line.startswith("| claim |"))
    datasets = [cell.strip() for cell in head.strip("|").split("|")][1:]
    cells = {row[0]: dict(zip(datasets, row[1:], strict=True))
             for row in _table("The claims of section 5.1")}  # fmt: skip
    assert len(found) == 30
    for row in found:
        expected = f"{MARK[row.verdict]}: {row.value:.2f} ({row.low:.2f} to {row.high:.2f})"
        assert cells[str(row.claim)][row.dataset] == expected
    others = [*claims_losses.fused_savings(published), *claims_losses.final_layer(published)]
    assert {row.verdict for row in others} == {"undecidable"}


@pytest.mark.shared
def test_tables_against_the_data(everything):
    found = beside_the_paper(everything)
    rows = {(row["dataset"], row["loss"]): row for row in records(found[found["table"] == 3])}
    table = _table("Tables against the data")
    assert len(table) == len(rows) == 10
    for dataset, loss, printed, own, memory, own_memory, _, _ in table:
        row = rows[dataset, loss]
        assert [printed, own] == [f"{row['ndcg_at_10']:.4f}", f"{row['own_ndcg_at_10']:.4f}"]
        assert [memory, own_memory] == [f"{row['memory_gb']:.1f}", f"{row['own_memory_gb']:.1f}"]


def test_values_that_two_tables_give_differently():
    expected = [
        [row["dataset"], row["loss"], row["quantity"], f"Table {row['table']}: {row['value']:g}",
         f"Table {row['other_table']}: {row['other_value']:g}"]
        for row in records(printed_twice())
    ]  # fmt: skip
    assert _table("Values that two tables give differently") == expected
    assert ["beauty", "cce", "epoch_seconds", "Table 3: 30.3", "Table 4: 80.3"] in expected


def test_differences_and_denominators():
    rows = records(contradictions())
    table = _table("Differences that the printed values do not give")
    assert len(table) == len(rows)
    for cells, row in zip(table, rows, strict=True):
        assert cells[1:4] == [
            row["dataset"], f"{row['loss_from']} to {row['loss_to']}", row["quantity"],
        ]  # fmt: skip
        assert cells[6] == f"{row['percent']:g}"
        if cells[7] != "–":
            assert cells[7] == f"{row['recomputed']:.1f}"
    counts = {(row["table"], row["agrees"]): row["differences"] for row in records(denominators())}
    kinds = ("value_from", "value_to", "neither", "not recomputable")
    for number, *cells in _table("Denominators"):
        assert [int(cell) for cell in cells] == [
            counts.get((int(number), kind), 0) for kind in kinds
        ]
