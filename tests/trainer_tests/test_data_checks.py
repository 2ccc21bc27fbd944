"""Bad input: one line that names file, line and remedy, and no dataset left behind."""

import datetime as dt
import gzip
from dataclasses import replace

import polars as pl
import pytest

from db.errors import DataError
from trainer.data.prepare import prepare
from trainer.data.sources import SourceOptions, open_source
from trainer.data.split import FilterOptions

HEADER = "user_id,item_id,timestamp"
GOOD = [
    f"{user},{item},{1_600_000_000 + 100 * item + user}" for item in range(9) for user in range(40)
]


def run(tmp_path, name="a.csv", source="csv", **options):
    return prepare(open_source(source, tmp_path / name, SourceOptions(**options)), tmp_path / "out")


def write(tmp_path, lines, name="a.csv"):
    (tmp_path / name).write_text("\n".join(lines) + "\n")


def refused(tmp_path, match, name="a.csv", source="csv", **options):
    with pytest.raises(DataError, match=match) as error:
        run(tmp_path, name, source, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("source", ["csv", "parquet", "movielens", "gowalla", "30music"])
def test_missing_file(tmp_path, source):
    write(tmp_path, [HEADER], "ratings.csv")
    refused(
        tmp_path, r"no file at .*rating\.csv; did you mean .*ratings\.csv", "rating.csv", source
    )
    refused(tmp_path, r"no file at .*x\.zip; check --input", "x.zip", source)


@pytest.mark.parametrize("source", ["csv", "parquet", "movielens", "gowalla"])
def test_empty_file_and_folder(tmp_path, source):
    (tmp_path / "a.csv").touch()
    refused(tmp_path, r"a\.csv is empty; fetch or export it again", source=source)
    (tmp_path / "folder").mkdir()
    refused(tmp_path, r"folder is a folder; give the file inside it", "folder", source)


def test_header_only_and_blank_lines(tmp_path):
    write(tmp_path, [HEADER])
    refused(tmp_path, "a.csv holds no rows")
    write(tmp_path, ["", ""])
    refused(tmp_path, "a.csv is empty")


@pytest.mark.parametrize(
    ("delimiter", "named"),
    [("\t", "TAB: pass --delimiter tab"), (";", "';': pass --delimiter ';'")],
)
def test_wrong_delimiter(tmp_path, delimiter, named):
    write(tmp_path, [line.replace(",", delimiter) for line in [HEADER, *GOOD]])
    refused(tmp_path, rf"a\.csv, line 1: 1 fields with delimiter ','.*looks separated by {named}")


def test_not_a_movielens_file(tmp_path):
    write(tmp_path, ["some;other;file"])
    refused(
        tmp_path,
        r"a\.csv, line 1: 'some;other;file' is none of MovieLens' layouts",
        source="movielens",
    )


def test_missing_column(tmp_path):
    write(tmp_path, ["user_id,item,timestamp", *GOOD])
    refused(
        tmp_path,
        r"a\.csv has no column 'item_id' \(did you mean 'item'\?\); it has user_id, item, "
        r"timestamp; name one with --item-column",
    )
    pl.DataFrame({"user_id": [1], "sku": [1], "timestamp": [1]}).write_parquet(
        tmp_path / "a.parquet"
    )
    refused(tmp_path, r"a\.parquet has no column 'item_id'.*--item-column", "a.parquet", "parquet")


def test_non_numeric_time_names_its_line(tmp_path):
    write(tmp_path, [HEADER, *GOOD[:3], "1,2,yesterday", *GOOD[3:]])
    refused(
        tmp_path,
        r"a\.csv: more than 0 bad rows; line 5: time 'yesterday' is not a time",
        max_bad_rows=0,
    )


@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
def test_a_few_bad_rows_are_counted_and_shown(tmp_path, block_bytes):
    lines = [HEADER, *GOOD]
    lines[4] = "1,2"
    lines[100] = ",2,1600000000"
    lines[200] = "1,2,-5"
    lines[250] = ""
    lines[300] = "1,,1600000000"
    lines[301] = "1,2,3,4"
    lines[302] = f"1,2,{int(dt.datetime(2200, 1, 1, tzinfo=dt.UTC).timestamp())}"
    write(tmp_path, lines)
    source = open_source("csv", tmp_path / "a.csv")
    dataset = prepare(replace(source, block_bytes=block_bytes), tmp_path / "out")
    counts = dataset.meta["counts"]
    assert counts["bad_rows"] == 6
    assert counts["raw_rows"] == len(GOOD) - 1
    assert counts["selected_rows"] == len(GOOD) - 7
    shown = [row for row in dataset.meta["bad_rows"] if "fields" not in row]
    assert shown[:2] == ["line 101: the user id is empty", "line 201: time -5 is negative"]
    assert "line 5: 2 fields instead of 3" in dataset.meta["bad_rows"]
    assert any(
        w.startswith("6 bad rows left out: line 5: 2 fields") for w in dataset.meta["warnings"]
    )


def test_too_many_bad_rows(tmp_path):
    lines = [HEADER, *GOOD]
    for row in range(10, 14):
        lines[row] = "1,2,x"
    write(tmp_path, lines)
    refused(
        tmp_path,
        r"more than 3 bad rows; line 11: .*; line 12: .*raise --max-bad-rows",
        max_bad_rows=3,
    )
    assert run(tmp_path, max_bad_rows=4).meta["counts"]["bad_rows"] == 4


def test_truncated_gzip(tmp_path):
    packed = gzip.compress("\n".join([HEADER, *GOOD * 500]).encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    refused(tmp_path, r"a\.csv\.gz is truncated or damaged \(.*\); fetch it again", "a.csv.gz")


def test_truncated_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    pl.DataFrame(
        {"user_id": range(999), "item_id": range(999), "timestamp": range(999)}
    ).write_parquet(file)
    file.write_bytes(file.read_bytes()[:-20])
    refused(tmp_path, r"a\.parquet is not a readable Parquet file", "a.parquet", "parquet")


def test_truncated_zip(tmp_path):
    (tmp_path / "ml.zip").write_bytes(b"PK\x03\x04 and then nothing")
    refused(tmp_path, r"ml\.zip is truncated or damaged", "ml.zip", "movielens")


def test_not_utf8_names_its_line(tmp_path):
    text = "\n".join([HEADER, *GOOD[:5], "Zo\u00eb,2,1600000000", *GOOD[5:]])
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    refused(tmp_path, r"a\.csv, line 7: not UTF-8 text; convert the file")


def test_binary_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x00\x01\x02\x03" * 50)
    refused(tmp_path, r"a\.csv is not a text file")


def test_mixed_units_of_time(tmp_path):
    lines = [HEADER, *GOOD]
    lines[8:10] = ["1,2,1600000000123", "1,3,1600000000124"]
    write(tmp_path, lines)
    refused(
        tmp_path,
        rf"times in mixed units \({len(GOOD) - 2} in s, 2 in ms by their size; first in ms at "
        r"line 9\); convert the time column to one unit",
    )


def test_numbers_among_datetimes_are_bad_rows(tmp_path):
    lines = [
        HEADER,
        *(f"{k % 40},{k // 40},2020-01-01T00:{k // 60:02}:{k % 60:02}" for k in range(360)),
    ]
    lines[20] = "1,2,1600000000"
    write(tmp_path, lines)
    refused(tmp_path, r"line 21: time '1600000000' is not a time", max_bad_rows=0)
    assert run(tmp_path).meta["time_unit"] == "us"


def test_times_of_zero_are_warned_about(tmp_path):
    write(tmp_path, [HEADER, *GOOD, "1,2,0"])
    (warning,) = run(tmp_path).meta["warnings"]
    assert warning.startswith("1 rows have times long before the others (first at line 362)")


def test_ids_of_mixed_types(tmp_path):
    write(tmp_path, [HEADER, *GOOD, "1.0,2,1600000000"])
    refused(
        tmp_path,
        r"a\.csv: user column has ids of mixed types: 40 whole numbers such as '0' and 1 others "
        r"such as '1\.0'.*--id-type string",
    )
    many = [f"u{k % 40}" if k % 2 else str(k % 40) for k in range(360)]
    write(
        tmp_path,
        [HEADER, *(f"{user},{k // 40},{1_600_000_000 + k}" for k, user in enumerate(many))],
    )
    dataset = run(tmp_path)
    assert set(dataset.user_ids.tolist()) == set(many)
    write(
        tmp_path,
        [HEADER, *GOOD, *(f"{k},7,1600000000" for k in range(100, 300)), "N/A,2,1600000000"],
    )
    with pytest.raises(DataError, match=r"others such as 'N/A'"):
        prepare(open_source("csv", tmp_path / "a.csv"), tmp_path / "other")
    options = SourceOptions(id_type="int", max_bad_rows=0)
    with pytest.raises(DataError, match=r"line 562: user id 'N/A' is not a whole number"):
        prepare(open_source("csv", tmp_path / "a.csv", options), tmp_path / "other")
    text = SourceOptions(id_type="string")
    dataset = prepare(open_source("csv", tmp_path / "a.csv", text), tmp_path / "text")
    assert isinstance(dataset.user_ids[0], str)


def test_ids_that_are_all_numbers_become_numbers(tmp_path):
    write(tmp_path, [HEADER, *GOOD])
    assert run(tmp_path).user_ids.dtype == "int64"


def test_leading_zeros_keep_ids_apart(tmp_path):
    lines = [
        f"{'0' * (k % 2)}{user},{k},{1_600_000_000 + 100 * k + user}"
        for k in range(8)
        for user in range(40)
    ]
    write(tmp_path, [HEADER, *lines])
    assert run(tmp_path).meta["counts"]["filtered_users"] == 80


def test_columns_of_impossible_types(tmp_path):
    file = tmp_path / "a.parquet"
    good = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": [10**9, 10**9]}
    for column, values, text in (
        ("user_id", [1.5, 2.0], "user column holds numbers with a fraction"),
        ("item_id", [[1], [2]], "item column is of type List"),
        ("timestamp", [True, False], "time column is of type Boolean"),
        ("timestamp", [dt.timedelta(1)] * 2, "time column is of type Duration"),
    ):
        pl.DataFrame({**good, column: values}).write_parquet(file)
        refused(tmp_path, text, "a.parquet", "parquet")


def test_missing_values_in_parquet_are_bad_rows(tmp_path):
    file = tmp_path / "a.parquet"
    users = [k % 40 for k in range(360)]
    frame = pl.DataFrame(
        {
            "user_id": [None, *users[1:]],
            "item_id": [k // 40 for k in range(360)],
            "timestamp": [1_600_000_000.0 + k for k in range(359)] + [float("nan")],
        }
    )
    frame.write_parquet(file)
    dataset = run(tmp_path, "a.parquet", "parquet")
    assert dataset.meta["bad_rows"] == [
        "row 1: the user id is empty",
        "row 360: time nan is not a time",
    ]


def test_selection_that_leaves_nothing(tmp_path):
    write(tmp_path, [HEADER + ",stars", *(f"{line},3" for line in GOOD)])
    refused(
        tmp_path,
        r"none of 360 rows passes the selection \(rating above 3.0.*lower --rating-above",
        rating_column="stars",
        rating_above=3.0,
    )
    write(tmp_path, [HEADER + ",stars", *(f"{line},good" for line in GOOD)])
    refused(
        tmp_path, r"line 2: rating 'good' is not a number", rating_column="stars", rating_above=3.0
    )


def test_fewer_users_than_the_filters_need(tmp_path):
    write(tmp_path, [HEADER, "1,1,1600000000", "1,2,1600000001", "2,1,1600000002"])
    refused(
        tmp_path,
        r"no interactions are left of 3 rows, 2 users and 2 items after keeping items with at "
        r"least 5 rows and users with at least 3; lower --min-item-count or --min-user-count",
    )
    with pytest.raises(DataError, match=r"leaves no test users of 2 users"):
        prepare(
            open_source("csv", tmp_path / "a.csv"),
            tmp_path / "out",
            filters=FilterOptions(min_item_count=1, min_user_count=1),
        )
