"""Checks of raw rows: what a file says becomes ids and times, or a bad row with its line number."""

import datetime as dt
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from db.errors import DataError
from trainer.data.interactions import Chunk, Int64Array, ReadReport

BoolArray = npt.NDArray[np.bool_]
IdType = Literal["auto", "int", "string"]

SHOWN_BAD_ROWS = 5
"""Bad rows quoted with their line numbers."""

DEFAULT_MAX_BAD_ROWS = 10
"""Bad rows that are left out before a file is refused."""

TIME_UNITS = ("unknown", "s", "ms", "us", "ns")
_UNIT_BOUNDS = (10**8, 10**11, 10**14, 10**17)
_UNITS_PER_SECOND = np.array([0, 1, 10**3, 10**6, 10**9], dtype=np.int64)
_SECONDS_OF_A_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """What makes a row usable, and which usable rows are selected."""

    id_type: IdType = "auto"
    """Type of user and item ids in text: int, string, or int where all of them are (auto)."""
    max_bad_rows: int = DEFAULT_MAX_BAD_ROWS
    """Bad rows that are left out; one more and the file is refused."""
    rating_above: float | None = None
    """Keep rows whose rating is greater; None keeps all."""
    event_equals: int | None = None
    """Keep rows of this kind of event; None keeps all."""


class RowChecker:
    """Turns raw columns into valid chunks and fills the report.

    Parameters
    ----------
    file : str
        Name of the file for messages.
    rules : RowRules
        What is usable, and what is selected.
    report : ReadReport
        Filled as chunks pass.
    line_word : str
        What a row's number counts: `line` in text, `row` in Parquet.
    now : float, optional
        Seconds since 1970 after which a time lies in the future; the clock's by default.
    """

    def __init__(
        self,
        file: str,
        rules: RowRules,
        report: ReadReport,
        line_word: str = "line",
        now: float | None = None,
    ) -> None:
        self._file = file
        self._rules = rules
        self._report = report
        self._word = line_word
        today = dt.datetime.now(dt.UTC).timestamp() if now is None else now
        self._latest = int(today) + _SECONDS_OF_A_DAY
        self._bad: list[tuple[int, str]] = []
        self._is_datetime_text: bool | None = None
        self._datetime_unit: str | None = None
        self._first_of_unit: dict[str, int] = {}
        self._num_of_unit: dict[str, int] = dict.fromkeys(TIME_UNITS, 0)

    def check(self, columns: Mapping[str, Any], lines: Callable[[int], int]) -> Chunk:
        """Valid and selected rows of some raw ones.

        Parameters
        ----------
        columns : mapping of str to pyarrow.Array
            `user`, `item`, `time` and, where the rules need them, `rating` and `event`.
        lines : callable
            From the position of a row to its line number in the file.

        Raises
        ------
        DataError
            More bad rows than the rules allow, or a column of a type that cannot be used.
        """
        columns = _drop_blank_rows(columns)
        if "_row" in columns:
            positions = columns["_row"].to_numpy()
            outer = lines
            lines = lambda row: outer(int(positions[row]))  # noqa: E731
        size = len(columns["user"])
        self._report.num_raw_rows += size
        bad = np.zeros(size, dtype=np.bool_)

        def refuse(mask: BoolArray, describe: Callable[[int], str]) -> None:
            new = mask & ~bad
            number = int(np.count_nonzero(new))
            if number:
                room = max(0, SHOWN_BAD_ROWS - len(self._bad))
                for row in np.flatnonzero(new)[: room + 1]:
                    self._bad.append((lines(int(row)), describe(int(row))))
                bad[new] = True
                self.add_bad(number)

        ids = {}
        for role in ("user", "item"):
            raw = columns[role]
            ids[role], wrong = parse_ids(raw, self._rules.id_type, f"{self._file}: {role} column")
            refuse(wrong, lambda row, raw=raw, role=role: _bad_id(role, raw[row].as_py()))  # type: ignore[misc]
        times, wrong = self._parse_times(columns["time"])
        refuse(wrong, lambda row: _bad_time(columns["time"][row].as_py()))
        refuse(times < 0, lambda row: f"time {times[row]} is negative")
        units = np.searchsorted(_UNIT_BOUNDS, times, side="right")
        future = times > self._latest * _UNITS_PER_SECOND[units]
        refuse(future & (units > 0), lambda row: f"time {times[row]} lies in the future")
        keep = self._select(columns, refuse) & ~bad
        self._note_units(units, ~bad, lines)
        self._report.num_selected_rows += int(np.count_nonzero(keep))
        if keep.all():
            return Chunk(ids["user"], ids["item"], times)
        mask = pa.array(keep)
        return Chunk(ids["user"].filter(mask), ids["item"].filter(mask), times[keep])

    def add_bad(self, number: int, line: int | None = None, text: str = "") -> None:
        """Count bad rows, and quote one where a line number is given.

        Raises
        ------
        DataError
            There are now more than `max_bad_rows`.
        """
        if line is not None:
            self._report.num_raw_rows += number
            if len(self._bad) < SHOWN_BAD_ROWS:
                self._bad.append((line, text))
        self._report.num_bad_rows += number
        self._report.bad_rows = [
            f"{self._word} {line}: {text}" for line, text in sorted(self._bad)[:SHOWN_BAD_ROWS]
        ]
        if self._report.num_bad_rows > self._rules.max_bad_rows:
            raise DataError(
                f"{self._file}: more than {self._rules.max_bad_rows} bad rows; "
                f"{'; '.join(self._report.bad_rows)}; mend the file, name other columns or "
                "another --delimiter, or raise --max-bad-rows"
            )

    def finish(self) -> None:
        """Complete the report: unit of the times, and what to warn about.

        Raises
        ------
        DataError
            The file holds no row, no selected row, or times in more than one unit.
        """
        report = self._report
        if not report.num_raw_rows:
            raise DataError(f"{self._file} holds no rows; fetch or export it again")
        found = [unit for unit in TIME_UNITS[1:] if self._num_of_unit[unit]]
        if len(found) > 1 and self._datetime_unit is None:
            rare = min(found, key=lambda unit: self._num_of_unit[unit])
            counts = ", ".join(f"{self._num_of_unit[unit]:,} in {unit}" for unit in found)
            raise DataError(
                f"{self._file}: times in mixed units ({counts} by their size; first in {rare} at "
                f"{self._word} {self._first_of_unit[rare]}); convert the time column to one unit"
            )
        report.time_unit = self._datetime_unit or (found[0] if found else "unknown")
        if found and self._num_of_unit["unknown"] and self._datetime_unit is None:
            report.warnings.append(
                f"{self._num_of_unit['unknown']:,} rows have times long before the others (first "
                f"at {self._word} {self._first_of_unit['unknown']}): missing times set to zero?"
            )
        if report.num_bad_rows:
            report.warnings.append(
                f"{report.num_bad_rows:,} bad rows left out: {'; '.join(report.bad_rows)}"
            )
        if not report.num_selected_rows:
            raise DataError(
                f"{self._file}: none of {report.num_raw_rows:,} rows passes the selection "
                f"(rating above {self._rules.rating_above}, event {self._rules.event_equals}); "
                "lower --rating-above or choose another --event"
            )

    def _parse_times(self, raw: Any) -> tuple[Int64Array, BoolArray]:
        """Integer times, and which rows have none."""
        series = _series(raw)
        if series.dtype.is_temporal():
            if series.dtype == pl.Duration or series.dtype == pl.Time:
                raise DataError(
                    f"{self._file}: the time column is of type {series.dtype}, not a moment; "
                    "name another --time-column"
                )
            if series.dtype == pl.Date:
                series = series.cast(pl.Datetime("ms"))
            unit = series.dtype.time_unit  # type: ignore[attr-defined]
            self._datetime_unit = unit
            return _integers(series.to_physical())
        if series.dtype == pl.String:
            if self._is_datetime_text is None:
                first = series.str.strip_chars().drop_nulls().head(1)
                numeric = first.cast(pl.Float64, strict=False).is_not_null().any()
                self._is_datetime_text = not numeric and _datetimes(first).is_not_null().any()
            if self._is_datetime_text:
                self._datetime_unit = "us"
                return _integers(_datetimes(series).to_physical())
            whole = series.str.strip_chars().cast(pl.Int64, strict=False)
            if whole.null_count():
                whole = whole.fill_null(_truncate(series.str.strip_chars()))
            return _integers(whole)
        if series.dtype.is_integer():
            return _integers(series.cast(pl.Int64, strict=False))
        if series.dtype.is_float():
            return _integers(_truncate(series))
        raise DataError(
            f"{self._file}: the time column is of type {series.dtype}, not a number or a datetime; "
            "name another --time-column"
        )

    def _select(
        self, columns: Mapping[str, Any], refuse: Callable[[BoolArray, Callable[[int], str]], None]
    ) -> BoolArray:
        keep = np.ones(len(columns["user"]), dtype=np.bool_)
        limits = (
            ("rating", self._rules.rating_above, np.greater),
            ("event", self._rules.event_equals, np.equal),
        )
        for role, limit, compare in limits:
            if limit is None:
                continue
            raw = columns[role]
            values = _series(raw).cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()
            refuse(
                np.isnan(values),
                lambda row, raw=raw, role=role: f"{role} {raw[row].as_py()!r} is not a number",  # type: ignore[misc]
            )
            keep &= compare(values, limit)
        return keep

    def _note_units(self, units: Int64Array, good: BoolArray, lines: Callable[[int], int]) -> None:
        for number, count in enumerate(np.bincount(units[good], minlength=len(TIME_UNITS))):
            unit = TIME_UNITS[number]
            if count and not self._num_of_unit[unit]:
                self._first_of_unit[unit] = lines(int(np.argmax(good & (units == number))))
            self._num_of_unit[unit] += int(count)


def parse_ids(raw: Any, id_type: IdType, where: str) -> tuple[Any, BoolArray]:
    """Ids as int64 or strings, and which rows have none.

    Parameters
    ----------
    raw : pyarrow.Array
        Text, integers, floats without fraction, or a dictionary of these.
    id_type : str
        `int` parses text; `string` writes integers as text; `auto` keeps the type.
    where : str
        File and column for messages.

    Raises
    ------
    DataError
        A type that cannot name a user or an item, or numbers with a fraction.
    """
    series = _series(raw)
    dtype = series.dtype
    if dtype.is_float():
        if (series.drop_nulls().drop_nans() % 1 != 0).any():
            raise DataError(
                f"{where} holds numbers with a fraction; give whole numbers or text as ids"
            )
        series = series.fill_nan(None).cast(pl.Int64, strict=False)
    elif not (dtype.is_integer() or dtype == pl.String):
        raise DataError(f"{where} is of type {dtype}; ids are whole numbers or text")
    if series.dtype == pl.String:
        series = series.str.strip_chars()
        if id_type == "int":
            series = series.cast(pl.Int64, strict=False)
        else:
            series = series.replace("", None)
    elif id_type == "string":
        series = series.cast(pl.String)
    else:
        series = series.cast(pl.Int64, strict=False)
    wrong = series.is_null().to_numpy()
    filled = series.fill_null("" if series.dtype == pl.String else -1)
    array = filled.to_arrow()
    return (array.cast(pa.string()) if filled.dtype == pl.String else array), wrong


def settle_ids(table: Any, id_type: IdType, where: str) -> Any:
    """Text ids as int64 if every one is a whole number; what looks like damage is refused.

    Parameters
    ----------
    table : pyarrow.Array
        Distinct ids.
    id_type : str
        Only `auto` changes anything.
    where : str
        File and column for messages.

    Raises
    ------
    DataError
        Ids of mixed types.
    """
    if id_type != "auto" or not pa.types.is_string(table.type):
        return table
    series = _series(table)
    numbers = series.cast(pl.Int64, strict=False)
    # '007' and '7' are two ids: only text that an integer is written as counts as one.
    whole = (numbers.cast(pl.String) == series).fill_null(False)
    if whole.all():
        return numbers.to_arrow()
    others = series.filter(~whole)
    floats = others.filter(others.str.contains(r"^-?\d+\.0*$"))
    num_whole = int(whole.sum())
    if num_whole and (len(floats) or len(others) < 0.01 * len(series)):
        odd = floats[0] if len(floats) else others[0]
        raise DataError(
            f"{where} has ids of mixed types: {num_whole:,} whole numbers such as "
            f"{series.filter(whole)[0]!r} and {len(others):,} others such as {odd!r}; mend the "
            "column, or pass --id-type string to take all as text, --id-type int to count the "
            "others as bad rows"
        )
    return table


def _series(raw: Any) -> pl.Series:
    if isinstance(raw, pa.ChunkedArray):
        raw = raw.combine_chunks()
    if pa.types.is_dictionary(raw.type):
        raw = raw.dictionary_decode()
    if pa.types.is_binary(raw.type) or pa.types.is_large_binary(raw.type):
        raw = raw.cast(pa.large_string())
    if pa.types.is_null(raw.type):
        raw = raw.cast(pa.string())
    series = pl.from_arrow(raw)
    assert isinstance(series, pl.Series)
    return series


def _drop_blank_rows(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the rows of text in which every field is empty; `_row` tells where rows were."""
    if not all(pa.types.is_string(column.type) for column in columns.values()):
        return columns
    user = columns["user"]
    empty = pc.equal(user, "")
    if not pc.any(empty).as_py():
        return columns
    for column in itertools.islice(columns.values(), 1, None):
        empty = pc.and_(empty, pc.equal(column, ""))
    keep = pc.invert(empty)
    kept = {role: column.filter(keep) for role, column in columns.items()}
    return {**kept, "_row": pa.array(np.flatnonzero(keep.to_numpy(zero_copy_only=False)))}


def _integers(series: pl.Series) -> tuple[Int64Array, BoolArray]:
    wrong = series.is_null().to_numpy()
    return series.fill_null(0).cast(pl.Int64).to_numpy(), wrong


def _truncate(series: pl.Series) -> pl.Series:
    values = series.cast(pl.Float64, strict=False)
    return (
        pl.select(pl.when(values.is_finite() & (values.abs() < 2**62)).then(values))
        .to_series()
        .cast(pl.Int64, strict=False)
    )


def _datetimes(series: pl.Series) -> pl.Series:
    """ISO 8601 dates and times in UTC, null where there is none."""
    text = series.str.strip_chars().str.replace(" ", "T", literal=True)
    text = text.str.replace(r"^(\d{4}-\d{2}-\d{2})$", "${1}T00:00:00")
    text = text.str.replace(r"(Z|[+-]00:?00)?$", "Z")
    zoned = text.str.replace(r"([+-]\d{2}):?(\d{2})Z$", "$1$2").str.replace(r"Z$", "+0000")
    return zoned.str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us", strict=False, time_zone="UTC"
    )


def _bad_id(role: str, value: object) -> str:
    if value is None or value == "" or value != value:
        return f"the {role} id is empty"
    return f"{role} id {value!r} is not a whole number"


def _bad_time(value: object) -> str:
    return "the time is empty" if value in (None, "") else f"time {value!r} is not a time"
