"""Counts of real data after the paper's filter and split, and what the command prints."""

import pytest

from sweeper.cli.main import main
from trainer.data.prepare import prepare
from trainer.data.sources import open_source

pytestmark = pytest.mark.shared


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("amazon2014-beauty-5core.parquet", (198_502, 22_363, 12_101, 198_502, 8.9, 4_942)),
        ("gowalla-1k-users.parquet", (157_251, 1_000, 8_254, 123_033, 123, 616)),
        ("online-retail.parquet", (397_924, 4_211, 3_193, 396_720, 94, 950)),
        ("oss-edits.parquet", (2_715_992, 14_866, 113_039, 1_997_625, 134, 1_369)),
    ],
)
def test_counts(shared, tmp_path, file, expected):
    meta = prepare(open_source("parquet", shared / "data" / file), tmp_path / "out").meta
    counts = meta["counts"]
    names = ("raw_rows", "filtered_users", "filtered_items", "filtered_rows")
    assert tuple(counts[name] for name in names) == expected[:4]
    assert meta["sequence_length"]["mean"] == pytest.approx(expected[4], abs=0.5)
    assert counts["num_test_users"] == expected[5]


def test_tie_shares(shared, tmp_path):
    beauty = open_source("parquet", shared / "data/amazon2014-beauty-5core.parquet")
    share = prepare(beauty, tmp_path / "beauty").meta["tied_target_share"]["test"]
    assert share == pytest.approx(1 / 3, abs=0.01)
    retail = prepare(
        open_source("parquet", shared / "data/online-retail.parquet"), tmp_path / "retail"
    )
    assert retail.meta["tied_target_share"]["test"] == pytest.approx(0.94, abs=0.005)
    assert isinstance(retail.item_ids[0], str)


def test_movietweetings_from_the_command_line(shared, tmp_path, capsys):
    ratings = shared / "data/movietweetings-100k/ratings.dat"
    out = tmp_path / "data/movietweetings"
    line = ["prepare", "--source", "movielens", "--input", str(ratings), "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        main(line)
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "movietweetings: 6,382 users, 2,722 items, 76,106 interactions" in printed
    assert "catalog 2,709 items" in printed
    assert "2,342 test users" in printed
    assert "tied test targets 0.0%" in printed
