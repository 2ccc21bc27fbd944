"""`srsweep query`: read-only SQL over the run database."""

import sys
from typing import Annotated

import typer

from db import query as reading
from db.errors import StoreError
from db.reader import TIMEOUT_SECONDS
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    output_format,
    print_rows,
)


def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT; '-' reads it from stdin.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Longest time of the query.")
    ] = TIMEOUT_SECONDS,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Ask the run database in SQL; nothing can be written this way.

    Tables: sweeps, sweep_runs, datasets, runs, attempts, steps, evaluations, histograms,
    run_summary, events. View run_steps: each step with the latest validation at or before it.

    Examples
    --------
        srsweep query "select status, count(*) from runs group by status"
        srsweep query "select loss, max(ndcg_at_10) from runs join run_summary
            on run_id = runs.id group by loss" --csv
        srsweep query "select step, loss, peak_bytes, ndcg_at_10 from run_steps limit 5"
        srsweep query - < question.sql
    """
    format = output_format(as_json, as_csv)
    text = sys.stdin.read() if sql == "-" else sql
    if not text.strip():
        raise StoreError("the query is empty; give one SELECT statement")
    print_rows(reading.rows(db, text, timeout_seconds=timeout), format)
