"""`srsweep export`: runs to CSV or Parquet."""

from pathlib import Path
from typing import Annotated

import typer

from sweeper.cli.options import DEFAULT_DATABASE, DatabaseOption


def export(
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write, .csv or .parquet.")
    ] = Path("runs.csv"),
    db: DatabaseOption = DEFAULT_DATABASE,
    sweep: Annotated[
        list[str] | None, typer.Option("--sweep", help="Only runs of this sweep; repeatable.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Only this dataset; repeatable.")
    ] = None,
) -> None:
    """Write every finished run with its settings and results to a CSV or Parquet file.

    `srsweep import csv` and `import parquet` read the file back unchanged.

    Examples
    --------
        srsweep export runs.csv --sweep demo
        srsweep export runs.parquet --db sqlite:///paper.db
    """
    from db.transfer import export_runs

    count = export_runs(db, out, sweeps=sweep, datasets=dataset)
    typer.echo(f"{count} runs written to {out}")
