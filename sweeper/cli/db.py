"""`srsweep db`: create, upgrade and check the run database."""

import typer

from db.store import RunStore
from sweeper.cli.options import DEFAULT_DATABASE, DatabaseOption

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def db() -> None:
    """Create, upgrade, check and copy the run database.

    Examples
    --------
        srsweep db upgrade --db sqlite:///runs.db
    """


@app.command()
def upgrade(db: DatabaseOption = DEFAULT_DATABASE) -> None:
    """Create the tables of a new database, or bring those of an older srsweep up to date.

    Examples
    --------
        srsweep db upgrade
        srsweep db upgrade --db postgresql://user@host/runs
    """
    store = RunStore.open(db, upgrade=True)
    typer.echo(f"{store}: the schema is up to date")
