"""Each published format on a few hand-written rows in its original layout."""

import datetime as dt
import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import polars as pl
import pytest

from db.errors import DataError
from trainer.data.sources import FORMATS, SourceOptions, open_source


def read(name, path, **options):
    """All rows of a source as lists, and its report."""
    chunks, report = open_source(name, path, SourceOptions(**options)).chunks()
    rows = []
    for chunk in chunks:
        columns = chunk.users.to_pylist(), chunk.items.to_pylist(), chunk.timestamps.tolist()
        rows.extend(zip(*columns, strict=True))
    return rows, report


def test_movielens_dat(tmp_path):
    file = tmp_path / "ratings.dat"
    file.write_text("1::1193::5::978300760\n1::661::3::978302109\n2::1193::4.5::978298413\n")
    rows, report = read("movielens", file)
    assert rows == [(1, 1193, 978300760), (1, 661, 978302109), (2, 1193, 978298413)]
    assert report.time_unit == "s"
    assert report.num_raw_rows == 3
    above, report = read("movielens", file, rating_above=3)
    assert above == [rows[0], rows[2]]
    assert report.num_selected_rows == 2


def test_movielens_csv(tmp_path):
    file = tmp_path / "ratings.csv"
    file.write_text(
        "userId,movieId,rating,timestamp\r\n1,2,3.5,1112486027\r\n1,29,3.0,1112484676\r\n"
    )
    assert read("movielens", file)[0] == [(1, 2, 1112486027), (1, 29, 1112484676)]
    assert read("movielens", file, rating_above=3)[0] == [(1, 2, 1112486027)]


def test_movielens_100k(tmp_path):
    file = tmp_path / "u.data"
    file.write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    assert read("movielens", file)[0] == [(196, 242, 881250949), (186, 302, 891717742)]


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ("ml-1m/ratings.dat", "1::1193::5::978300760\n"),
        ("ml-20m/ratings.csv", "userId,movieId,rating,timestamp\n1,1193,5,978300760\n"),
        ("ml-100k/u.data", "1\t1193\t5\t978300760\n"),
    ],
)
def test_movielens_archive(tmp_path, member, text):
    file = tmp_path / "ml.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ml/README", "terms")
        archive.writestr(member, text)
    assert read("movielens", file)[0] == [(1, 1193, 978300760)]


def test_amazon_2014_and_2018_swap_users_and_items(tmp_path):
    file = tmp_path / "ratings_Beauty.csv"
    file.write_text(
        "A39HTATAQ9V7YF,0205616461,5.0,1369699200\nA3JM6GV9MNOF9X,0558925278,3.0,1355443200\n"
    )
    assert read("amazon2014", file)[0] == [
        ("A39HTATAQ9V7YF", "0205616461", 1369699200),
        ("A3JM6GV9MNOF9X", "0558925278", 1355443200),
    ]
    file = tmp_path / "All_Beauty.csv"
    file.write_text("0143026860,A1V6B6TNIC10QE,1.0,1424304000\n")
    assert read("amazon2018", file)[0] == [("A1V6B6TNIC10QE", "0143026860", 1424304000)]


def test_amazon_2023_milliseconds_and_its_selection(tmp_path):
    file = tmp_path / "Beauty_and_Personal_Care.csv.gz"
    text = "user_id,parent_asin,rating,timestamp\n"
    text += "AE22,B07J3GH1W1,5.0,1547589356557\nAE22,B07W397QG4,3.0,1593352422858\n"
    file.write_bytes(gzip.compress(text.encode()))
    rows, report = read("amazon2023", file)
    assert rows == [("AE22", "B07J3GH1W1", 1547589356557)]
    assert report.time_unit == "ms"
    assert report.num_raw_rows == 2
    assert len(read("amazon2023", file, rating_above=0)[0]) == 2


def test_gowalla(tmp_path):
    file = tmp_path / "loc-gowalla_totalCheckins.txt.gz"
    text = "0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847\n"
    text += "0\t2010-10-18T22:17:43Z\t30.2691029532\t-97.7493953705\t420315\n"
    file.write_bytes(gzip.compress(text.encode()))
    rows, report = read("gowalla", file)
    moments = [(2010, 10, 19, 23, 55, 27), (2010, 10, 18, 22, 17, 43)]
    seconds = [int(dt.datetime(*moment, tzinfo=dt.UTC).timestamp()) for moment in moments]
    assert rows == [(0, 22847, seconds[0] * 10**6), (0, 420315, seconds[1] * 10**6)]
    assert report.time_unit == "us"


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_zvuk(tmp_path, unit):
    file = tmp_path / "zvuk-interactions.parquet"
    moment = dt.datetime(2023, 1, 18, 12, 30, tzinfo=dt.UTC).replace(tzinfo=None)
    pl.DataFrame(
        {
            "user_id": [1, 2],
            "session_id": [10, 11],
            "datetime": [moment, moment + dt.timedelta(seconds=1)],
            "track_id": [98, 99],
            "play_duration": [120, -3],
        },
        schema_overrides={"datetime": pl.Datetime(unit), "user_id": pl.Int32},
    ).write_parquet(file)
    rows, report = read("zvuk", file)
    scale = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    start = int(moment.replace(tzinfo=dt.UTC).timestamp())
    assert rows == [(1, 98, start * scale), (2, 99, (start + 1) * scale)]
    assert report.time_unit == unit


IDOMAAR = [
    'event.play\t1\t1390231051\t{"playtime":176}\t{"subjects":[{"type":"user","id":44361}],'
    '"objects":[{"type":"track","id":414939}]}',
    'event.play\t2\t1390231231\t{"playtime":80}\t{"subjects":[{"type":"user","id":7}],'
    '"objects":[{"type":"track","id":5}]}',
]


def test_30music_from_the_file_and_from_the_archive(tmp_path):
    file = tmp_path / "events.idomaar"
    file.write_text("\n".join(IDOMAAR) + "\n")
    expected = [(44361, 414939, 1390231051), (7, 5, 1390231231)]
    assert read("30music", file)[0] == expected
    archive = tmp_path / "ThirtyMusic.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (
            ("entities/users.idomaar", b"user\t1\t-1\t{}\t{}\n"),
            ("relations/events.idomaar", file.read_bytes()),
            ("relations/love.idomaar", b"preference\t0\t1\t{}\t{}\n"),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert read("30music", archive)[0] == expected


def test_archive_without_interactions(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"a\.zip is an archive of readme\.txt; unpack it"):
        read("movielens", tmp_path / "a.zip")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("love.idomaar"))
    with pytest.raises(DataError, match=r"a\.tar\.gz is an archive of love\.idomaar; unpack it"):
        read("30music", tmp_path / "a.tar.gz")


def test_30music_row_without_a_track_is_a_bad_row(tmp_path):
    file = tmp_path / "events.idomaar"
    file.write_text(IDOMAAR[0] + "\n" + IDOMAAR[1].replace('"track"', '"album"') + "\n")
    rows, report = read("30music", file)
    assert rows == [(44361, 414939, 1390231051)]
    assert report.bad_rows == ["line 2: the item id is empty"]


def test_megamarket_keeps_one_kind_of_event(tmp_path):
    file = tmp_path / "megamarket.parquet"
    moment = dt.datetime(2023, 1, 15, tzinfo=dt.UTC).replace(tzinfo=None)
    pl.DataFrame(
        {
            "user_id": [1, 1, 2, 2],
            "datetime": [moment] * 4,
            "event": np.array([0, 2, 3, 2], dtype=np.int8),
            "item_id": [5, 6, 7, 8],
            "category_id": [1, 1, 1, 1],
            "price": [1.0, 2.0, 3.0, 4.0],
        }
    ).write_parquet(file)
    assert [row[:2] for row in read("megamarket", file)[0]] == [(1, 6), (2, 8)]
    assert [row[:2] for row in read("megamarket", file, event=0)[0]] == [(1, 5)]


def test_recbole_atomic_file(tmp_path):
    file = tmp_path / "ml-100k.inter"
    file.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "196\t242\t3\t881250949\n186\t302\t3\t891717742.0\n"
    )
    rows, _ = read("recbole", file)
    assert rows == [("196", "242", 881250949), ("186", "302", 891717742)]


def test_csv_with_named_columns_quotes_and_spaces(tmp_path):
    file = tmp_path / "clicks.csv"
    file.write_text(
        'at,visitor,sku,stars\n"2024-03-01 10:00:00","anna, b","x ""1""",4\n'
        "2024-03-01T10:00:01.5+01:00, carl ,y,5\n"
    )
    options = {"user_column": "visitor", "item_column": "sku", "time_column": "at"}
    rows, report = read("csv", file, **options)
    assert [row[:2] for row in rows] == [("anna, b", 'x "1"'), ("carl", "y")]
    start = int(dt.datetime(2024, 3, 1, 10, tzinfo=dt.UTC).timestamp())
    assert [row[2] for row in rows] == [start * 10**6, (start - 3600) * 10**6 + 1_500_000]
    assert report.time_unit == "us"
    assert [
        row[0] for row in read("csv", file, rating_column="stars", rating_above=4, **options)[0]
    ] == ["carl"]


@pytest.mark.parametrize(
    ("name", "delimiter", "given"),
    [("a.tsv", "\t", None), ("a.txt", "\t", "tab"), ("a.csv", ";", ";"), ("a.dat", "::", "::")],
)
def test_csv_delimiters(tmp_path, name, delimiter, given):
    file = tmp_path / name
    lines = [("user_id", "item_id", "timestamp"), ("u1", "i1", "1700000000")]
    file.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    assert read("csv", file, delimiter=given)[0] == [("u1", "i1", 1700000000)]


def test_csv_without_header_takes_numbers_from_one(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("1700000000,u1,i1\n1700000001,u2,i2\n")
    options = {"user_column": "2", "item_column": "3", "time_column": "1", "header": False}
    assert read("csv", file, **options)[0] == [("u1", "i1", 1700000000), ("u2", "i2", 1700000001)]
    with pytest.raises(DataError, match="--item-column 'sku' is not a number from 1"):
        read("csv", file, **{**options, "item_column": "sku"})
    with pytest.raises(DataError, match="needs numbers from 1 in --time-column"):
        read("csv", file, **{**options, "time_column": None})
    with pytest.raises(DataError, match="3 fields, the item is field 9"):
        read("csv", file, **{**options, "item_column": "9"})


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series([1700000000, 1700000001]), "s"),
        (pl.Series([1700000000.0, 1700000001.0]), "s"),
        (pl.Series([1700000000000, 1700000001000]), "ms"),
        (pl.Series(["2024-01-01", "2024-01-02T10:00:00Z"]), "us"),
        (pl.Series([dt.date(2024, 1, 1), dt.date(2024, 1, 2)]), "ms"),
        (pl.Series([1, 2]), "unknown"),
    ],
)
def test_parquet_kinds_of_time(tmp_path, column, expected):
    file = tmp_path / "a.parquet"
    pl.DataFrame({"user_id": ["a", "b"], "item_id": [1, 2], "timestamp": column}).write_parquet(
        file
    )
    rows, report = read("parquet", file)
    assert report.time_unit == expected
    assert rows[0][2] < rows[1][2]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pl.Series([7, 8], dtype=pl.UInt32), [7, 8]),
        (pl.Series([7.0, 8.0]), [7, 8]),
        (pl.Series(["7", "x"]), ["7", "x"]),
        (pl.Series(["7", "x"], dtype=pl.Categorical), ["7", "x"]),
        (pl.Series([b"7", b"x"]), ["7", "x"]),
    ],
)
def test_parquet_kinds_of_ids(tmp_path, column, expected):
    file = tmp_path / "a.parquet"
    frame = pl.DataFrame({"user_id": column, "item_id": [1, 2], "timestamp": [10**9, 10**9]})
    frame.write_parquet(file)
    assert [row[0] for row in read("parquet", file)[0]] == expected


def test_settings_are_recorded_without_the_place_of_the_file(tmp_path):
    file = tmp_path / "ratings.dat"
    file.write_text("1::1193::5::978300760\n")
    settings = open_source("movielens", file, SourceOptions(rating_above=3)).settings
    assert settings["file"] == "ratings.dat"
    assert settings["rating_above"] == 3
    assert str(tmp_path) not in json.dumps(settings)


def test_unknown_source_names_the_nearest():
    with pytest.raises(DataError, match=r"'movelens' \(did you mean 'movielens'\?\)") as error:
        open_source("movelens", "x")
    assert all(name in str(error.value) for name in FORMATS)


def test_rating_threshold_needs_a_rating(tmp_path):
    with pytest.raises(DataError, match=r"rating_above=3 needs a rating.*--rating-column"):
        open_source("csv", tmp_path / "x.csv", SourceOptions(rating_above=3.0))


@pytest.mark.parametrize("delimiter", ["", "ab"])
def test_impossible_delimiter(tmp_path, delimiter):
    file = tmp_path / "a.csv"
    file.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=f"delimiter '{delimiter}' is neither"):
        open_source("csv", file, SourceOptions(delimiter=delimiter))
