"""Runs to and from CSV and Parquet files.

What `export_runs` writes, `import_table` reads back unchanged. Other people's files are read
through a mapping of their column names, units and fixed values.
"""

import csv
import datetime
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from db import query
from db.errors import SpecError, TransferError
from db.imported import ForeignRun, ImportCounts, put_foreign
from db.schema import SPEC_COLUMNS, run_summary
from db.spec import RunSpec, RunStatus, field_types, suggestion
from db.store import DatasetRecord, source_fingerprint

UNITS: dict[str, float] = {
    "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "KB": 1e3, "MB": 1e6, "GB": 1e9,
    "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0,
}  # fmt: skip
"""Factor of each unit to bytes or seconds."""

_RUN_COLUMNS = ("run_key", "source", "replicate")
_DATASET_COLUMNS = ("num_users", "num_items", "num_items_filtered", "num_interactions")
_SUMMARY = {
    column.name: column.type
    for column in run_summary.c
    if column.name not in {"run_id", "attempt_id", "status", "device_class"}
}
_NOTES = ("reason", "skipped_by")
EXPORT_COLUMNS: tuple[str, ...] = (
    *_RUN_COLUMNS, "dataset_fingerprint", *_DATASET_COLUMNS, *SPEC_COLUMNS, "status", *_NOTES,
    "device_class", *_SUMMARY,
)  # fmt: skip
"""Columns of an exported file, in order."""
_NEEDED = ("dataset", "loss", "batch_size", "max_seq_len")
_MISSING = {"", "null", "none", "nan", "na", "n/a"}
_BYTES_FLOOR = 1e6


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """How a foreign file is read.

    Attributes
    ----------
    columns : mapping of str to str
        Their column name to ours; columns that already have our name need none.
    units : mapping of str to str
        Our column name to the unit of the file (`UNITS`); bytes and seconds by default.
    values : mapping of str to str
        Our column name to a value that holds for every row.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedTable:
    """What an import of a file did."""

    counts: ImportCounts
    notes: tuple[str, ...]


def export_runs(
    url: str,
    path: Path,
    *,
    sweeps: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> int:
    """Write every finished run to a CSV or Parquet file, by its suffix.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    TransferError
        Another suffix, no run, or the file cannot be written.
    """
    if path.suffix not in {".csv", ".parquet"}:
        raise TransferError(f"{path.name}: name a file that ends in .csv or .parquet")
    rows = _exported_rows(url, sweeps, datasets)
    if not rows:
        raise TransferError("no finished run to export; 'srsweep runs' lists what is there")
    try:
        (_write_csv if path.suffix == ".csv" else _write_parquet)(path, rows)
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from None
    return len(rows)


def import_table(
    url: str,
    path: Path,
    *,
    source: str | None = None,
    sweep: str | None = None,
    mapping: ColumnMapping | None = None,
) -> ImportedTable:
    """Read runs from a CSV or Parquet file; importing it again changes nothing.

    Parameters
    ----------
    url : str
        Run database.
    path : Path
        `.parquet`, or anything else as CSV.
    source : str, optional
        Where the runs are from; needed unless the file has a column `source`.
    sweep : str, optional
        Sweep to list them under; the file's name by default.
    mapping : ColumnMapping, optional

    Raises
    ------
    TransferError
        A needed column is missing, or a cell does not fit; the text names row and column.
    """
    mapping = mapping or ColumnMapping()
    _check_mapping(mapping)
    names, rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    names, ignored = _our_names(path, names, mapping)
    notes = [f"{len(ignored)} columns are not imported: {', '.join(ignored[:8])}."] * bool(ignored)
    reader = _RowReader(path.name, names, mapping, source)
    foreign = [reader.run(number, cells) for number, cells in enumerate(rows, start=2)]
    if not foreign:
        raise TransferError(f"{path.name} holds no run below its header")
    _check_units(path, foreign)
    counts = put_foreign(
        url,
        sweep or path.name,
        f"imported from {path.name}",
        list(reader.datasets.values()),
        foreign,
    )
    return ImportedTable(counts, tuple(notes + reader.notes()))


class _RowReader:
    """Rows of one file to runs."""

    def __init__(
        self, file: str, names: Sequence[str], mapping: ColumnMapping, source: str | None
    ) -> None:
        self.file, self.names, self.mapping, self.source = file, names, mapping, source
        self.datasets: dict[str, DatasetRecord] = {}
        self.seen: Counter[str] = Counter()
        self.not_finite: Counter[str] = Counter()
        self.defaulted: Counter[str] = Counter()

    def run(self, number: int, cells: Sequence[Any]) -> ForeignRun:
        """One row."""
        place = f"{self.file}, row {number}"
        if len(cells) != len(self.names):
            raise TransferError(f"{place}: {len(cells)} cells under {len(self.names)} columns")
        row = {name: cell for name, cell in zip(self.names, cells, strict=True) if name}
        row = {**row, **self.mapping.values}
        row = {name: None if _is_missing(cell) else cell for name, cell in row.items()}
        source = str(row.get("source") or self.source or "")
        if not source:
            raise TransferError(f"{place}: no source; name where the runs are from with --source")
        spec = self._spec(row, place)
        fingerprint = str(
            row.get("dataset_fingerprint") or source_fingerprint(source, spec.dataset)
        )
        self._dataset(row, spec.dataset, fingerprint, source, place)
        status = self._status(row, place)
        point = f"{fingerprint}{spec!r}"
        replicate = row.get("replicate")
        summary = self._summary(row, place)
        device = row.get("device_class")
        measured = any(value is not None for value in summary.values())
        if device is None and measured:
            device = f"unknown device of {source}"
            self.defaulted["device_class"] += 1
        run = ForeignRun(
            spec=spec,
            fingerprint=fingerprint,
            replicate=(
                self.seen[point] if replicate is None else _whole(replicate, "replicate", place)
            ),
            source=source,
            status=status,
            device_class=None if device is None else str(device),
            summary=summary,
            notes={name: row.get(name) for name in _NOTES},
            provenance={"file": self.file, "row": number},
        )  # fmt: skip
        self.seen[point] += 1
        if row.get("run_key") not in (None, run.key):
            raise TransferError(
                f"{place}: run_key {str(row['run_key'])[:12]} does not belong to these settings "
                f"({run.key[:12]} does); leave the column out to import edited rows"
            )
        return run

    def notes(self) -> list[str]:
        """What was assumed or dropped, in sentences."""
        out = [
            f"{count} values of {name} that are not finite are stored as missing."
            for name, count in self.not_finite.items()
        ]
        return out + [
            f"{count} rows have no {name}; {_ASSUMED[name]} is assumed."
            for name, count in self.defaulted.items()
        ]

    def _spec(self, row: Mapping[str, Any], place: str) -> RunSpec:
        values: dict[str, Any] = {}
        for name in _NEEDED:
            if row.get(name) is None:
                raise TransferError(f"{place}, column {name}: the value is missing")
        for name in SPEC_COLUMNS:
            cell = row.get(name)
            if name == "num_negatives" and cell is not None and str(cell).lower() in {"inf", "all"}:
                cell = None
            if cell is not None:
                values[name] = _field(cell, name, place)
        if "precision" not in values:
            values["precision"] = "fp32"
            self.defaulted["precision"] += 1
        try:
            return RunSpec.from_mapping(values)
        except SpecError as error:
            raise TransferError(f"{place}: {error}") from None

    def _status(self, row: Mapping[str, Any], place: str) -> RunStatus:
        text = str(row.get("status") or RunStatus.DONE)
        final = [str(status) for status in RunStatus if status.is_final]
        if text not in final:
            raise TransferError(f"{place}, column status: {text!r} is no final status"
                                f"{suggestion(text, final)}")  # fmt: skip
        return RunStatus(text)

    def _summary(self, row: Mapping[str, Any], place: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, kind in _SUMMARY.items():
            cell = row.get(name)
            if cell is None:
                out[name] = None
            elif isinstance(kind, sa.Text):
                out[name] = str(cell)
            elif isinstance(kind, sa.Double | sa.BigInteger):
                out[name] = self._measure(cell, name, place, isinstance(kind, sa.BigInteger))
            else:
                out[name] = _time(cell, name, place)
        for name, measured in _MEASURED_BY.items():
            if out[name] is None and any(out[measure] is not None for measure in measured):
                out[name] = "published_mixed"
                self.defaulted[name] += 1
        return out

    def _measure(self, cell: Any, name: str, place: str, whole: bool) -> float | int | None:
        number = _number(cell, name, place)
        if not math.isfinite(number):
            self.not_finite[name] += 1
            return None
        number *= UNITS[self.mapping.units.get(name, "B")]
        return round(number) if whole else number

    def _dataset(
        self, row: Mapping[str, Any], name: str, fingerprint: str, source: str, place: str
    ) -> None:
        if fingerprint in self.datasets:
            return
        counts = {
            key: None if row.get(key) is None else _whole(row[key], key, place)
            for key in _DATASET_COLUMNS
        }
        details = {"source": source, "file": self.file}
        self.datasets[fingerprint] = DatasetRecord(
            name=name, fingerprint=fingerprint, details=details, **counts
        )


_MEASURED_BY = {
    "memory_source": ("peak_train_memory_bytes", "peak_eval_memory_bytes"),
    "time_source": ("epoch_seconds", "evaluation_seconds", "step_seconds", "tokens_per_second"),
}
"""Columns that name how others were measured, and these others."""
_ASSUMED = {
    "precision": "fp32",
    "device_class": "one unknown device of that source",
    "memory_source": "published_mixed (training and evaluation together)",
    "time_source": "published_mixed (evaluation included)",
}


def _check_mapping(mapping: ColumnMapping) -> None:
    for name in [*mapping.columns.values(), *mapping.units, *mapping.values]:
        if name not in EXPORT_COLUMNS:
            raise TransferError(f"{name!r} is no column of ours{suggestion(name, EXPORT_COLUMNS)}")
    for name, unit in mapping.units.items():
        if unit not in UNITS:
            raise TransferError(f"unit {unit!r} of {name} is unknown{suggestion(unit, UNITS)}")


def _our_names(
    path: Path, names: Sequence[str], mapping: ColumnMapping
) -> tuple[list[str], list[str]]:
    """Our name of each column, empty for those left out; and the names of these."""
    for theirs in mapping.columns:
        if theirs not in names:
            raise TransferError(f"{path.name} has no column {theirs!r}{suggestion(theirs, names)}")
    ours = [mapping.columns.get(name, name if name in EXPORT_COLUMNS else "") for name in names]
    twice = [name for name, count in Counter(ours).items() if name and count > 1]
    if twice:
        raise TransferError(f"{path.name}: two columns would become {twice[0]!r}; map one of them")
    missing = [name for name in _NEEDED if name not in ours and name not in mapping.values]
    if missing:
        raise TransferError(
            f"{path.name} lacks {', '.join(missing)}; map its columns with --map THEIRS=OURS or "
            "give one value for all rows with --set OURS=VALUE"
        )
    return ours, [theirs for theirs, name in zip(names, ours, strict=True) if not name]


def _check_units(path: Path, foreign: Sequence[ForeignRun]) -> None:
    for name in ("peak_train_memory_bytes", "peak_eval_memory_bytes"):
        values = [run.summary[name] for run in foreign if run.summary.get(name) is not None]
        small = [value for value in values if 0 < value < _BYTES_FLOOR]
        if small:
            share = "" if len(small) == len(values) else f" in {len(small)} of {len(values)} rows"
            raise TransferError(
                f"{path.name}: {name}={small[0]} bytes{share} is too little for a training run; "
                f"give the file's unit, for example --unit {name}=GiB"
                + (", and files with mixed units in parts" if share else "")
            )


def _read_csv(path: Path) -> tuple[list[str], Iterable[Sequence[Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except OSError as error:
        raise TransferError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TransferError(f"{path.name} is no CSV in UTF-8 ({error})") from None
    if not lines:
        raise TransferError(f"{path.name} is empty")
    return lines[0], lines[1:]


def _read_parquet(path: Path) -> tuple[list[str], Iterable[Sequence[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TransferError(f"{path.name} is no readable Parquet file ({error})") from None
    return table.column_names, list(
        zip(*(column.to_pylist() for column in table.columns), strict=True)
    )


def _is_missing(cell: Any) -> bool:
    if cell is None or (isinstance(cell, str) and cell.strip().lower() in _MISSING):
        return True
    return isinstance(cell, float) and math.isnan(cell)


def _field(cell: Any, name: str, place: str) -> Any:
    """A cell as the type that RunSpec has for the field."""
    kind = str(field_types()[name])
    if "bool" in kind:
        words = {"true": True, "1": True, "false": False, "0": False}
        if str(cell).lower() not in words:
            raise TransferError(f"{place}, column {name}: {cell!r} is neither true nor false")
        return words[str(cell).lower()]
    if name == "negatives_share" and str(cell) == "batch":
        return "batch"
    if "int" in kind:
        return _whole(cell, name, place)
    return _number(cell, name, place) if "float" in kind else str(cell).strip()


def _number(cell: Any, name: str, place: str) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise TransferError(f"{place}, column {name}: {cell!r} is not a number") from None


def _whole(cell: Any, name: str, place: str) -> int:
    if isinstance(cell, str) and cell.strip().lstrip("-").isdecimal():
        return int(cell)
    number = _number(cell, name, place)
    if not math.isfinite(number) or number != int(number):
        raise TransferError(f"{place}, column {name}: {cell!r} is not a whole number")
    return int(number)


def _time(cell: Any, name: str, place: str) -> datetime.datetime:
    if isinstance(cell, datetime.datetime):
        moment = cell
    else:
        try:
            moment = datetime.datetime.fromisoformat(str(cell))
        except ValueError:
            raise TransferError(f"{place}, column {name}: {cell!r} is no ISO 8601 time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _exported_rows(
    url: str, sweeps: Sequence[str] | None, names: Sequence[str] | None
) -> list[tuple[Any, ...]]:
    frame = query.summary_frame(url, sweeps=sweeps, datasets=names)
    if frame.empty:
        return []
    found = query.rows(
        url, "select run_key, fingerprint from runs join datasets on datasets.id = dataset_id"
    )
    fingerprints = {row["run_key"]: row["fingerprint"] for row in found}
    frame = frame.assign(dataset_fingerprint=frame["run_key"].map(fingerprints))
    whole = {name for name, kind in _SUMMARY.items() if isinstance(kind, sa.BigInteger)}
    whole |= {"replicate", *_DATASET_COLUMNS}
    whole |= {name for name, kind in field_types().items() if "int" in str(kind)} - _TEXT_FIELDS
    columns = [
        [_cell(value, name in whole) for value in frame[name].tolist()] for name in EXPORT_COLUMNS
    ]
    return list(zip(*columns, strict=True))


_TEXT_FIELDS = {"negatives_share"}


def _cell(value: Any, whole: bool) -> Any:
    if value is None or value != value:
        return None
    if hasattr(value, "to_pydatetime"):
        value = value.to_pydatetime()
    return int(value) if whole else value


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(EXPORT_COLUMNS)
        writer.writerows([[_text(cell) for cell in row] for row in rows])


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, datetime.datetime):
        return cell.isoformat()
    return repr(cell) if isinstance(cell, float) else str(cell)


def _write_parquet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict(zip(EXPORT_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    arrays = {name: pa.array(values, type=_arrow_type(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path)


def _arrow_type(name: str) -> Any:
    import pyarrow as pa

    kind = _SUMMARY.get(name)
    if isinstance(kind, sa.Double):
        return pa.float64()
    if isinstance(kind, sa.BigInteger) or name in {"replicate", *_DATASET_COLUMNS}:
        return pa.int64()
    if kind is not None and not isinstance(kind, sa.Text):
        return pa.timestamp("us", tz="UTC")
    text = str(field_types().get(name, str))
    if name in _TEXT_FIELDS or name not in field_types():
        return pa.string()
    for word, arrow in (("bool", pa.bool_()), ("int", pa.int64()), ("float", pa.float64())):
        if word in text:
            return arrow
    return pa.string()
