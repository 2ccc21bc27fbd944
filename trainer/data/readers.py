"""Readers of delimited text and Parquet: raw columns in chunks, with line numbers."""

import contextlib
import difflib
import gzip
import operator
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from db.errors import DataError
from trainer.data.checks import RowChecker, RowRules
from trainer.data.interactions import Chunk, ReadReport

BLOCK_BYTES = 1 << 24
"""Bytes of text parsed at a time."""

BATCH_ROWS = 1 << 20
"""Rows of Parquet read at a time."""

_DELIMITER_NAMES = {"\t": "TAB", ",": "','", ";": "';'", "::": "'::'", "|": "'|'", " ": "space"}
_PROBE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How a text file names or places its columns."""

    delimiter: str
    """One character, or `::`."""
    header: bool
    """Whether the first line names the columns."""
    columns: Mapping[str, str | int]
    """Role (user, item, time, rating, event) to column name, or to position from 0."""
    quoted: bool = False
    """Whether double quotes enclose fields."""
    typed_header: bool = False
    """Whether the header's names end in a type, as in `user_id:token`."""
    member: str | None = None
    """End of the name of the file inside an archive."""
    extract: Mapping[str, str] = field(default_factory=dict)
    """Role to a regular expression whose first group is taken from the field."""


@dataclass(frozen=True)
class TextSource:
    """A delimited text file, plain, gzipped or inside a zip or tar archive."""

    path: Path
    """File to read."""
    layout: TextLayout
    """Its columns."""
    rules: RowRules
    """Usable and selected rows."""
    settings: dict[str, Any]
    """What `dataset.json` records."""
    block_bytes: int = BLOCK_BYTES
    """Bytes parsed at a time."""

    def chunks(self) -> tuple[Iterator[Chunk], ReadReport]:
        """Valid rows in order, and the report that fills while they are read."""
        report = ReadReport(file=self.path.name, id_type=self.rules.id_type)
        return self._iterate(report), report

    def _iterate(self, report: ReadReport) -> Iterator[Chunk]:
        layout, name = self.layout, self.path.name
        first_line = probe_text(self.path, layout.member)
        fields, positions = _place_columns(first_line, layout, name)
        checker = RowChecker(name, self.rules, report)
        header_lines = int(layout.header)
        skipped: list[int] = []

        def skip(row: Any) -> str:
            skipped.append(row.number)
            actual, expected = _num_fields(row.actual_columns, layout), fields
            checker.add_bad(1, row.number, f"{actual} fields instead of {expected}")
            return "skip"

        width = fields if layout.delimiter != "::" else 2 * fields - 1
        names = [str(number) for number in range(width)]
        wanted = {role: names[place] for role, place in positions.items()}
        start = 0
        with open_bytes(self.path, layout.member) as stream, _reading(self.path, layout):
            reader = pyarrow.csv.open_csv(
                stream,
                read_options=pyarrow.csv.ReadOptions(
                    use_threads=False,
                    block_size=self.block_bytes,
                    column_names=names,
                    skip_rows=header_lines,
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=layout.delimiter[0],
                    quote_char='"' if layout.quoted else False,
                    ignore_empty_lines=False,
                    invalid_row_handler=skip,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=list(dict.fromkeys(wanted.values())),
                ),
            )
            for batch in reader:
                columns = {role: batch.column(at) for role, at in wanted.items()}
                columns = _extract(columns, layout)
                first, gaps = start, np.sort(np.array(skipped, dtype=np.int64))
                yield checker.check(columns, partial(_line, first + 1 + header_lines, gaps))
                start += len(batch)
        checker.finish()


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file whose columns have types."""

    path: Path
    """File to read."""
    columns: Mapping[str, str]
    """Role (user, item, time, rating, event) to column name."""
    rules: RowRules
    """Usable and selected rows."""
    settings: dict[str, Any]
    """What `dataset.json` records."""
    batch_rows: int = BATCH_ROWS
    """Rows read at a time."""

    def chunks(self) -> tuple[Iterator[Chunk], ReadReport]:
        """Valid rows in order, and the report that fills while they are read."""
        report = ReadReport(file=self.path.name, id_type=self.rules.id_type)
        return self._iterate(report), report

    def _iterate(self, report: ReadReport) -> Iterator[Chunk]:
        _require_file(self.path)
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{self.path} is not a readable Parquet file ({_one_line(error)}); "
                "fetch it again or choose another --source"
            ) from None
        with file:
            names = file.schema_arrow.names
            for role, column in self.columns.items():
                _require_column(column, names, self.path.name, f"--{role}-column")
            checker = RowChecker(self.path.name, self.rules, report, line_word="row")
            start = 1
            try:
                for batch in file.iter_batches(
                    self.batch_rows, columns=list(dict.fromkeys(self.columns.values()))
                ):
                    columns = {role: batch.column(name) for role, name in self.columns.items()}
                    yield checker.check(columns, partial(operator.add, start))
                    start += len(batch)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{self.path} is damaged after row {start - 1:,} ({_one_line(error)}); "
                    "fetch it again"
                ) from None
        checker.finish()


@contextlib.contextmanager
def open_bytes(path: Path, member: str | None = None) -> Iterator[Any]:
    """Open a file for reading, unpacking gzip, and a member of a zip or tar archive.

    Parameters
    ----------
    path : Path
        File or archive; recognised by its first bytes, not by its name.
    member : str, optional
        End of the member's name inside an archive.

    Raises
    ------
    DataError
        No such file, or the archive has no such member.
    """
    _require_file(path)
    with path.open("rb") as raw:
        magic = raw.read(4)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive, _zip_member(archive, path, member) as file:
            yield pa.PythonFile(file, mode="r")
    elif magic.startswith(b"\x1f\x8b") and _is_tar(path):
        with tarfile.open(path, "r|gz") as tar, _tar_member(tar, path, member) as file:
            yield pa.PythonFile(file, mode="r")
    elif magic.startswith(b"\x1f\x8b"):
        with pa.input_stream(str(path), compression="gzip") as stream:
            yield stream
    else:
        with pa.input_stream(str(path), compression=None) as stream:
            yield stream


def probe_text(path: Path, member: str | None = None) -> str:
    """First non-empty line of a text file.

    Raises
    ------
    DataError
        Missing, empty, damaged or not text.
    """
    with _reading(path, None), open_bytes(path, member) as stream:
        start = stream.read(_PROBE_BYTES)
    if b"\x00" in start:
        raise DataError(f"{path} is not a text file; choose another --source")
    text: str = start.decode("utf-8-sig", errors="replace")
    for line in text.splitlines():
        if line.strip():
            return line
    raise DataError(f"{path} is empty; fetch or export it again")


def _place_columns(line: str, layout: TextLayout, name: str) -> tuple[int, dict[str, int]]:
    """Number of fields, and the position of each role's field in pyarrow's columns."""
    fields = [part.strip() for part in line.split(layout.delimiter)]
    if layout.quoted:
        fields = [part.strip('"') for part in fields]
    if layout.typed_header:
        fields = [part.split(":")[0] for part in fields]
    if len(fields) < 3:
        raise DataError(
            f"{name}, line 1: {len(fields)} fields with delimiter "
            f"{_DELIMITER_NAMES.get(layout.delimiter, repr(layout.delimiter))}, at least 3 are "
            f"needed{_other_delimiter(line, layout.delimiter)}"
        )
    places = {}
    for role, column in layout.columns.items():
        if isinstance(column, str):
            _require_column(column, fields, name, f"--{role}-column")
            place = fields.index(column)
        elif column < len(fields):
            place = column
        else:
            raise DataError(
                f"{name}, line 1: {len(fields)} fields, the {role} is field {column + 1}; "
                "choose another --source or name the columns"
            )
        # Between the two colons of '::' pyarrow sees an empty column.
        places[role] = place if layout.delimiter != "::" else 2 * place
    return len(fields), places


def _require_column(column: str, names: list[str], file: str, option: str) -> None:
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DataError(
        f"{file} has no column {column!r}{hint}; it has {', '.join(names[:20])}; "
        f"name one with {option}"
    )


def _other_delimiter(line: str, used: str) -> str:
    counts = {mark: line.count(mark) for mark in ("::", "\t", ",", ";", "|") if mark != used}
    best = max(counts, key=lambda mark: counts[mark])
    if counts[best] < 2:
        return "; name it with --delimiter"
    word = {"\t": "tab", "::": "::"}.get(best, f"'{best}'")
    return f"; it looks separated by {_DELIMITER_NAMES[best]}: pass --delimiter {word}"


def _num_fields(pyarrow_columns: int, layout: TextLayout) -> int:
    return pyarrow_columns if layout.delimiter != "::" else (pyarrow_columns + 1) // 2


def _line(first: int, skipped: npt.NDArray[np.int64], row: int) -> int:
    """Line number of a row that the parser kept, from the numbers of the lines it left out."""
    line = first + row
    for gap in skipped:
        if gap > line:
            break
        line += 1
    return line


def _extract(columns: dict[str, Any], layout: TextLayout) -> dict[str, Any]:
    """Take the wanted part of a field, or nothing where it does not match."""
    columns = dict(columns)
    for role, pattern in layout.extract.items():
        found = pl.Series(columns[role]).str.extract(pattern).fill_null("")
        columns[role] = found.to_arrow().cast(pa.string())
    return columns


@contextlib.contextmanager
def _reading(path: Path, layout: TextLayout | None) -> Iterator[None]:
    """Errors of decompression and parsing in the words of the user."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.ReadError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it") from None
    except (pa.ArrowInvalid, OSError) as error:
        text = _one_line(error)
        if "UTF8" in text or "UTF-8" in text:
            member = layout.member if layout else None
            raise DataError(
                f"{path}, line {_line_of_bad_utf8(path, member)}: not UTF-8 text; "
                "convert the file, for instance with iconv"
            ) from None
        if "ompress" in text or "zlib" in text or "runcated" in text:
            raise DataError(f"{path} is truncated or damaged ({text}); fetch it again") from None
        raise DataError(f"{path} cannot be read as text ({text})") from None


def _line_of_bad_utf8(path: Path, member: str | None) -> int:
    with open_bytes(path, member) as stream:
        number, rest = 1, b""
        while block := stream.read(1 << 20):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return number
                number += 1
    return number


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the file inside it")
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], 1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; check --input"
        raise DataError(f"no file at {path}{hint}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty; fetch or export it again")


def _is_tar(path: Path) -> bool:
    with gzip.open(path) as file:
        try:
            head = file.read(512)
        except (EOFError, OSError, zlib.error):
            return False
    return head[257:262] == b"ustar"


def _zip_member(archive: zipfile.ZipFile, path: Path, member: str | None) -> Any:
    names = [name for name in archive.namelist() if not name.endswith("/")]
    return archive.open(_pick_member(names, path, member))


def _tar_member(tar: tarfile.TarFile, path: Path, member: str | None) -> BinaryIO | Any:
    names = []
    for entry in tar:
        names.append(entry.name)
        if entry.isfile() and member and entry.name.endswith(member):
            return tar.extractfile(entry)
    raise _no_member(names, path)


def _pick_member(names: list[str], path: Path, member: str | None) -> str:
    fitting = [name for name in names if member and name.endswith(tuple(member.split("|")))]
    if len(fitting) != 1:
        raise _no_member(names, path)
    return fitting[0]


def _no_member(names: list[str], path: Path) -> DataError:
    return DataError(
        f"{path} is an archive of {', '.join(names[:8]) or 'nothing'}; unpack it and give the "
        "file of interactions"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
