"""`srsweep runs`: list, filter and sort runs."""

import sys
import time
from typing import Annotated, Any

import typer

from db import query
from db.errors import StoreError
from db.measures import MEASURES
from db.spec import RunStatus, suggestion
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    OutputFormat,
    output_format,
    print_rows,
)

_SHOWN = (
    "run_key", "dataset", "loss", "batch_size", "max_seq_len", "num_negatives", "seed", "status",
    "ndcg_at_10", "coverage_at_10", "surprisal_at_10", "peak_train_memory_bytes", "step_seconds",
    "train_seconds",
)  # fmt: skip
_WATCH_SECONDS = 2.0


def runs(
    run_key: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="Key of one run, or its beginning, to see in full."),
    ] = None,
    db: DatabaseOption = DEFAULT_DATABASE,
    sweep: Annotated[str | None, typer.Option(help="Only runs of this sweep.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this dataset.")] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this status; repeatable. One of {', '.join(RunStatus)}."),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(help="Column to sort by, the best first; '-COLUMN' turns it round."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns, separated by commas; 'all' for every one.")
    ] = None,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="List the sweeps instead.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the list again and again.")] = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """List runs with their main results.

    Examples
    --------
        srsweep runs --sweep demo --sort ndcg_at_10 --limit 10
        srsweep runs --status failed --columns run_key,loss,reason
        srsweep runs --sweep demo --watch
        srsweep runs --csv > runs.csv
        srsweep runs 3f2a81c0
        srsweep runs --sweeps
    """
    format = output_format(as_json, as_csv)
    if run_key is not None:
        show_run(db, run_key, format)
        return
    if sweeps:
        print_rows(sweep_rows(db), format)
        return
    names = _columns(columns, format)
    order = sort_order(sort)
    while True:
        rows = query.runs(db, sweep=sweep, dataset=dataset, status=status, order=order, limit=limit)
        if watch and format is OutputFormat.TABLE:
            typer.echo("\x1b[2J\x1b[H" if sys.stdout.isatty() else "", nl=False)
        print_rows(rows, format, columns=names)
        if not watch:
            return
        try:
            time.sleep(_WATCH_SECONDS)
        except KeyboardInterrupt:
            return


def sort_order(sort: str | None) -> str | None:
    """Order that puts the best first: metrics descend, times and memory ascend."""
    if sort is None:
        return None
    name = sort.removeprefix("-")
    measure = MEASURES.get(name.removeprefix("validation_"))
    descending = (measure is not None and measure.maximise) != sort.startswith("-")
    return f"-{name}" if descending else name


def _columns(text: str | None, format: OutputFormat) -> tuple[str, ...]:
    if text is None:
        return _SHOWN if format is OutputFormat.TABLE else query.LISTED
    if text == "all":
        return query.LISTED
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in query.LISTED:
            raise StoreError(f"no column {name!r}{suggestion(name, query.LISTED)}")
    return names


def sweep_rows(db: str) -> list[dict[str, Any]]:
    """One row per sweep: its runs by status, the last launched first."""
    counts = ", ".join(
        f"sum(case when r.status = '{status}' then 1 else 0 end) as {status}"
        for status in RunStatus
    )
    return query.rows(
        db,
        f"select s.name as sweep, count(*) as runs, {counts}, s.launched_at from sweeps s "
        "join sweep_runs m on m.sweep_id = s.id join runs r on r.id = m.run_id "
        "group by s.id, s.name, s.launched_at order by s.launched_at desc",
    )


def show_run(db: str, run_key: str, format: OutputFormat) -> None:
    """Print everything about one run, and its attempts.

    Raises
    ------
    StoreError
        No such run, or several begin like this.
    """
    if not run_key.isalnum():
        raise StoreError(f"run {run_key!r} is not a key; `srsweep runs` lists them")
    found = query.rows(
        db, "select * from runs where run_key like :start limit 2", {"start": f"{run_key}%"}
    )
    if len(found) != 1:
        problem = "is the beginning of several keys" if found else "is not in the database"
        raise StoreError(f"run {run_key!r} {problem}; `srsweep runs` lists them")
    run = found[0]
    results = query.rows(db, "select * from run_summary where run_id = :id", {"id": run["id"]})
    tries = query.rows(
        db,
        "select number, status, device_class, timing, host, pid, started_at, ended_at, last_step, "
        "error_class, error_message, git_commit from attempts where run_id = :id order by number",
        {"id": run["id"]},
    )
    if format is not OutputFormat.TABLE:
        print_rows([{**run, "results": results, "attempts": tries}], format)
        return
    for record in [run, *results]:
        for name, value in record.items():
            if value is not None and name not in ("id", "run_id", "attempt_id", "dataset_id"):
                typer.echo(f"{name:<28} {value}")
        typer.echo("")
    print_rows(tries)
