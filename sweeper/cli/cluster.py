"""`srsweep cluster`: look at a Ray cluster before a sweep is started on it."""

from typing import Annotated, Any

import typer

from sweeper.cli.options import (
    DEFAULT_DATA_DIR,
    DEFAULT_DATABASE,
    DatabaseOption,
    DataDirOption,
    JsonOption,
    OutputFormat,
    print_rows,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def cluster() -> None:
    """Check a Ray cluster before a sweep.

    Examples
    --------
        srsweep cluster check --address head:6379 --db postgresql://user@host/runs
    """


@app.command()
def check(
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray cluster; without it this machine is checked."),
    ] = None,
    db: DatabaseOption = DEFAULT_DATABASE,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    as_json: JsonOption = False,
) -> None:
    """Ask every node for its versions, devices, clock, datasets and its way to the database.

    The exit code is 1 when something would spoil a sweep.

    Examples
    --------
        srsweep cluster check --address head:6379 --db postgresql://user@host/runs
        srsweep cluster check --json
    """
    from sweeper.cluster import check_cluster

    found, problems = check_cluster(address, db, data_dir)
    rows: list[dict[str, Any]] = [node.row() for node in found]
    print_rows(rows, OutputFormat.JSON if as_json else OutputFormat.TABLE)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
    if not as_json:
        typer.echo(f"{len(found)} node(s), no problem found")
