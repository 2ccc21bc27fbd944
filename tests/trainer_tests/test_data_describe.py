import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from db.errors import DataError
from sweeper.cli.main import main
from sweeper.describe_plots import FIGURES, write_figures
from trainer.data import describe as module
from trainer.data.dataset import load_dataset
from trainer.data.describe import describe, gini
from trainer.data.generate import GeneratedSource, GeneratorOptions
from trainer.data.interactions import Interactions, InteractionsSource
from trainer.data.prepare import prepare


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    options = GeneratorOptions(num_users=300, num_items=200, interactions_per_user=15, seed=3)
    return prepare(GeneratedSource(options), tmp_path_factory.mktemp("data") / "small")


def run(*words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return stop.value.code or 0


def test_gini():
    assert gini([5, 5, 5, 5]) == pytest.approx(0)
    assert gini([0, 0, 0, 8]) == pytest.approx(3 / 4)
    assert gini([1, 2, 3]) == pytest.approx(2 / 9)
    with pytest.raises(DataError, match="counts that are not all zero"):
        gini([0, 0])


def test_tables_add_up(dataset):
    found = describe(dataset)
    assert sum(row["users"] for row in found.lengths) == dataset.num_train_users
    assert found.lengths[0]["length_from"] == 1
    for low, high in zip(found.lengths[:-1], found.lengths[1:], strict=True):
        assert low["length_to"] == high["length_from"]
    assert found.popularity[0] == {
        "rank": 1,
        "rows": dataset.item_counts.max(),
        "cumulated_row_share": pytest.approx(dataset.item_counts.max() / dataset.item_counts.sum()),
    }
    assert found.popularity[-1]["cumulated_row_share"] == pytest.approx(1)
    assert found.popularity[-1]["rank"] == dataset.num_items
    assert sum(row["rows"] for row in found.drift) == len(dataset.items)
    assert found.coverage[-1]["row_share"] == 1
    lengths = dataset.train.lengths
    first = found.coverage[0]
    kept = sum(min(int(length), 17) for length in lengths)
    assert first == {
        "max_seq_len": 16,
        "row_share": pytest.approx(kept / lengths.sum()),
        "truncated_user_share": pytest.approx(float(np.mean(lengths > 17))),
    }
    summary = {row["measure"]: row["value"] for row in found.summary}
    targets = zip(dataset.test.starts, dataset.test.ends, dataset.test.targets, strict=True)
    seen = [target in dataset.items[start:end] for start, end, target in targets]
    assert summary["test targets already seen"] == pytest.approx(np.mean(seen))
    assert summary["users"] == dataset.meta["counts"]["filtered_users"]


def test_drift_of_a_catalog_that_changes_completely(tmp_path):
    """Ten items for each twelfth of the time; the last two twelfths share theirs."""
    rng = np.random.default_rng(0)
    times = np.arange(1, 12_001)  # the first hours of 1970
    items = np.minimum((times - 1) // 1000, 10) * 10 + rng.integers(0, 10, len(times))
    users = rng.integers(0, 50, len(times))
    found = prepare(InteractionsSource(Interactions(users, items, times)), tmp_path / "out")
    drift = describe(found).drift
    assert [row["rows"] for row in drift] == [1000] * 12
    assert [row["items"] for row in drift] == [10] * 12
    assert {row["begins"] for row in drift} == {"1970-01-01"}
    assert [row["new_item_row_share"] for row in drift] == [None, *[1.0] * 10, 0.0]
    assert [row["top_overlap_previous"] for row in drift] == [None, *[0.0] * 10, 1.0]
    assert [row["top_overlap_first"] for row in drift] == [None, *[0.0] * 11]


def test_blocks_change_nothing(dataset, monkeypatch):
    whole = describe(dataset)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 97)
    assert describe(dataset) == whole


def test_figures_come_with_what_they_drew(dataset, tmp_path):
    description = describe(dataset)
    written = write_figures(description, tmp_path / "figures")
    names = {path.name for path in written}
    for name in FIGURES:
        assert {f"{name}.svg", f"{name}.png", f"{name}.csv"} <= names
        with (tmp_path / f"figures/{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(getattr(description, name))
    again = write_figures(description, tmp_path / "again")
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_plots_draw_the_rows(dataset):
    from matplotlib.figure import Figure

    description = describe(dataset)
    axes = Figure().add_subplot()
    assert FIGURES["popularity"](axes, description.popularity) is axes
    assert axes.lines[0].get_ydata().tolist() == [row["rows"] for row in description.popularity]
    axes = FIGURES["drift"](Figure().add_subplot(), description.drift)
    assert axes.lines[0].get_ydata().tolist() == [
        row["top_overlap_previous"] for row in description.drift if row["period"] > 1
    ]


def test_figures_into_a_file(dataset, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match=r"cannot write to .*taken.*choose another --out"):
        write_figures(describe(dataset), tmp_path / "taken")


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--users", "200", "--items", "90", "--interactions-per-user", "12")
    assert run("generate", *options, "--out", "data/demo") == 0
    assert "demo: " in capsys.readouterr().out
    assert run("generate", *options, "--out", "demo.csv") == 0
    assert "interactions of 200 users written to demo.csv" in capsys.readouterr().out
    line = ("prepare", "--source", "csv", "--input", "demo.csv", "--out", "data/again", "--json")
    assert run(*line) == 0
    meta = json.loads(capsys.readouterr().out)
    assert meta["fingerprint"] == load_dataset("data/demo").fingerprint
    assert run("data", "list", "--csv") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["name"] for row in rows] == ["again", "demo"]
    assert run("data", "describe", "demo", "--out", "figures", "--json") == 0
    captured = capsys.readouterr()
    summary = {row["measure"]: row["value"] for row in json.loads(captured.out)}
    assert summary["test users"] == len(load_dataset("data/demo").test)
    assert "files written to figures" in captured.err
    assert run("data", "describe", "data/demo") == 0
    assert "Gini of item popularity" in capsys.readouterr().out
    assert run("data", "check", "demo") == 0
    assert "demo: unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("data", "describe", "none"), "no prepared dataset at data/none"),
        (("data", "check", "none"), "no prepared dataset at data/none"),
        (("generate", "--users", "0", "--out", "x"), "num_users=0 is below 1"),
        (("prepare", "--source", "csv", "--out", "x"), "--source csv needs --input FILE"),
        (("prepare", "--source", "zvuk", "--out", "x"), "zvuk has no direct download"),
        (
            ("prepare", "--source", "csv", "--input", "n.csv", "--out", "x"),
            "no file at n.csv; check --input",
        ),
        (
            ("prepare", "--source", "csv", "--input", "n.csv", "--out", "x", "--split", "random"),
            "--split 'random' is neither global-temporal nor leave-one-out",
        ),
        (
            ("prepare", "--source", "csv", "--input", "n.csv", "--out", "x", "--id-type", "hex"),
            "--id-type 'hex' is none of auto, int, string",
        ),
        (
            ("prepare", "--source", "csv", "--input", "n.csv", "--out", "x", "--tie-order", "id"),
            "--tie-order 'id' is none of row, item-age, item-id",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert text in error[-1]
    assert error[-1].startswith("srsweep: ")


def test_listing_needs_neither_torch_nor_matplotlib(dataset):
    code = (
        "import sys; from sweeper.cli.data import list_datasets; from pathlib import Path;"
        f"list_datasets(Path({str(dataset.path.parent)!r}));"
        "print(sorted({'torch', 'matplotlib', 'ray', 'pandas', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
