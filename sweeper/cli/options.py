"""Options that several commands share, and how rows are printed."""

import csv
import datetime as dt
import enum
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from db.errors import SrsweepError

DEFAULT_DATABASE = "sqlite:///srsweep.db"
"""The run database when neither `--db` nor SRSWEEP_DB names another."""
DEFAULT_DATA_DIR = Path("data")
"""Folder whose subfolders are prepared datasets."""

DatabaseOption = Annotated[
    str,
    typer.Option(
        "--db",
        envvar="SRSWEEP_DB",
        metavar="URL",
        help="Run database: sqlite:///FILE or postgresql://USER@HOST/NAME.",
    ),
]
DataDirOption = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="SRSWEEP_DATA_DIR",
        metavar="FOLDER",
        help="Folder that holds the prepared datasets, one subfolder each.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")]


class OutputFormat(enum.StrEnum):
    """How rows are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def output_format(as_json: bool, as_csv: bool) -> OutputFormat:
    """Format that the two flags ask for.

    Raises
    ------
    SrsweepError
        Both at once.
    """
    if as_json and as_csv:
        raise SrsweepError("--json and --csv exclude each other; give one of them")
    if as_json:
        return OutputFormat.JSON
    return OutputFormat.CSV if as_csv else OutputFormat.TABLE


def print_rows(
    rows: Iterable[Mapping[str, Any]],
    format: OutputFormat = OutputFormat.TABLE,
    *,
    columns: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Print rows to standard output.

    Parameters
    ----------
    rows : iterable of mapping
        Column name to value.
    format : OutputFormat
        A table is drawn with rich on a terminal and as aligned plain text elsewhere.
    columns : sequence of str, optional
        Columns and their order; those of the first row by default.
    title : str, optional
        Line above a table; JSON and CSV go without.
    """
    rows = list(rows)
    names = list(columns) if columns is not None else list(rows[0]) if rows else []
    if format is OutputFormat.JSON:
        content = [{name: _plain(row.get(name)) for name in names} for row in rows]
        sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
    elif format is OutputFormat.CSV:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if names:
            writer.writerow(names)
        writer.writerows(
            ["" if row.get(name) is None else _plain(row[name]) for name in names] for row in rows
        )
    elif sys.stdout.isatty():
        _print_rich(rows, names, title)
    else:
        _print_aligned(rows, names, title)


def format_value(name: str, value: Any) -> str:
    """Text of one value in a table: bytes as GiB or MiB, times and metrics to four digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    if name.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name.endswith("_key") and isinstance(value, str):
        return value[:12]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dt.datetime | dt.date):
        return value.isoformat()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _print_rich(rows: list[Mapping[str, Any]], names: list[str], title: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=None, header_style="bold", pad_edge=False)
    for name in names:
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(format_value(name, row.get(name))) for name in names))
    Console().print(table)


def _print_aligned(rows: list[Mapping[str, Any]], names: list[str], title: str | None) -> None:
    cells = [names] + [[format_value(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    if title:
        print(title)
    if names:
        for line in cells:
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(text.rstrip())
