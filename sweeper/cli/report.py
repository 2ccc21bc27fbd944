"""`srsweep report`: figures, tables, findings and one HTML page."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from db.errors import SrsweepError
from sweeper.cli.options import DEFAULT_DATABASE, DatabaseOption


def report(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the report goes.")
    ] = Path("report"),
    db: DatabaseOption = DEFAULT_DATABASE,
    sweep: Annotated[
        list[str] | None, typer.Option("--sweep", help="Only runs of this sweep; repeatable.")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", help="Only this dataset; repeatable.")
    ] = None,
    selection: Annotated[
        str,
        typer.Option(
            help="published: of the paper's runs those that its figures show; all: every run."
        ),
    ] = "published",
    repeats: Annotated[
        str,
        typer.Option(help="as_published: repeated runs count as often as they occur; without."),
    ] = "as_published",
    full_catalog: Annotated[
        str,
        typer.Option(
            help="Runs without a number of negatives: paper (left out of pairs with it), "
            "vocabulary (the catalog size), drop."
        ),
    ] = "paper",
    bars: Annotated[
        str,
        typer.Option(
            help="Bars of quality against negatives: standard_deviation, standard_error_interval."
        ),
    ] = "standard_deviation",
    hidden: Annotated[
        str,
        typer.Option(
            help="Runs that the trade-off figure leaves out: none; paper, those that the paper's "
            "Fig. 5 leaves out."
        ),
    ] = "none",
    resamples: Annotated[
        int, typer.Option(min=200, help="Bootstrap resamples of every interval.")
    ] = 10_000,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
) -> None:
    """Analyse the runs of a database: figures, tables, findings and one page that opens offline.

    Results are kept in the folder; what did not change since is not computed again.

    Examples
    --------
        srsweep report --out report/
        srsweep report --out report/ --sweep demo
        srsweep report --db sqlite:///paper.db --out paper-report/ --repeats without
    """
    choices = {
        "selection": (selection, ("published", "all")),
        "repeats": (repeats, ("as_published", "without")),
        "full-catalog": (full_catalog, ("paper", "vocabulary", "drop")),
        "bars": (bars, ("standard_deviation", "standard_error_interval")),
        "hidden": (hidden, ("none", "paper")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise SrsweepError(f"--{name} {value!r} is unknown; allowed are {', '.join(allowed)}")

    from analysis.report import ReportOptions, write_report

    options = ReportOptions(
        selection=selection,  # type: ignore[arg-type]
        repeats=repeats,  # type: ignore[arg-type]
        full_catalog=full_catalog,  # type: ignore[arg-type]
        bars=bars,  # type: ignore[arg-type]
        hidden=hidden,  # type: ignore[arg-type]
        resamples=resamples,
        jobs=jobs,
    )
    begin = time.perf_counter()
    written = write_report(db, out, sweeps=sweep, datasets=dataset, options=options, progress=_say)
    if written.unchanged:
        typer.echo(f"{written.index} is up to date: nothing has changed since it was written")
        return
    for note in dict.fromkeys(written.notes):
        typer.echo(f"note: {note}", err=True)
    size = written.index.stat().st_size / 1e6
    typer.echo(
        f"{written.index} ({size:.1f} MB) and {len(written.files) - 1} figures and tables "
        f"in {time.perf_counter() - begin:.0f} s"
    )


def _say(stage: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"  {stage} ...", err=True)
