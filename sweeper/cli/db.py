"""`srsweep db`: create, upgrade, check, copy and prune the run database, and who may use it."""

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from db.connect import check_local, shown, sqlite_path
from db.errors import StoreError
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    OutputFormat,
    output_format,
    print_rows,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_PASSWORD_VARIABLE = "SRSWEEP_GRANT_PASSWORD"


class Role(enum.StrEnum):
    """What `srsweep db grant` lets a user do."""

    READER = "reader"
    WRITER = "writer"


@app.callback()
def db() -> None:
    """Create, upgrade, check, copy and prune the run database, and say who may use it.

    Examples
    --------
        srsweep db upgrade --db sqlite:///runs.db
        srsweep db doctor
        srsweep db copy sqlite:///runs.db postgresql://user@host/runs
    """


@app.command()
def upgrade(db: DatabaseOption = DEFAULT_DATABASE) -> None:
    """Create the tables of a new database, or bring those of an older srsweep up to date.

    An older SQLite file is backed up beside itself first.

    Examples
    --------
        srsweep db upgrade
        srsweep db upgrade --db postgresql://user@host/runs
    """
    from db.migrate import back_up_older
    from db.store import RunStore

    check_local(db)
    backup = back_up_older(db)
    if backup is not None:
        typer.echo(f"the database as it was is kept as {backup}")
    store = RunStore.open(db, upgrade=True)
    typer.echo(f"{store}: the schema is up to date")


@app.command()
def check(db: DatabaseOption = DEFAULT_DATABASE) -> None:
    """Say whether this srsweep can use a database: reachable, its own, of its schema.

    Examples
    --------
        srsweep db check --db postgresql://user@host/runs
    """
    from db.doctor import described

    typer.echo(described(db))


@app.command()
def copy(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="URL of the database to read.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="URL of a new file or an empty database.")
    ],
    live: Annotated[
        bool, typer.Option("--live", help="Copy although attempts are running.")
    ] = False,
) -> None:
    """Copy a whole run database, all or nothing: a backup, or a move to another kind.

    From SQLite to SQLite this is an online backup that writers do not notice. After a move, point
    SRSWEEP_DB at the new place. A copy that was interrupted leaves nothing; type the line again.

    Examples
    --------
        srsweep db copy sqlite:///runs.db sqlite:///backup.db --live
        srsweep db copy sqlite:///runs.db postgresql://user@host/runs
    """
    from db.copy import copy_database

    counts = copy_database(source, target, live=live)
    print_rows([{"table": name, "rows": count} for name, count in counts.items()])
    typer.echo(f"{shown(target)} has every row of {shown(source)}")


@app.command()
def prune(
    db: DatabaseOption = DEFAULT_DATABASE,
    steps: Annotated[
        bool, typer.Option("--steps", help="Remove step rows; nothing else can be.")
    ] = False,
    keep_every: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Keep each Nth step and the last; else none."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Only runs of this sweep.")] = None,
    older_than_days: Annotated[
        float, typer.Option(min=0.0, metavar="DAYS", help="Only attempts that ended before.")
    ] = 0.0,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Only attempts after which another was made.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Give the room back to the disk afterwards.")
    ] = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Thin or remove the step rows of finished runs.

    Evaluations, histograms, summaries and events stay, as do all rows of pending and running runs.

    Examples
    --------
        srsweep db prune --steps --keep-every 100 --dry-run
        srsweep db prune --steps --superseded
        srsweep db prune --steps --sweep demo --older-than-days 90 --vacuum
    """
    from db import retention

    format = output_format(as_json, as_csv)
    if not steps:
        raise StoreError("say what to prune: --steps")
    rule = retention.Retention(
        keep_every=keep_every, sweep=sweep, older_than_days=older_than_days, superseded=superseded
    )
    found = retention.prune_steps(db, rule, dry_run=dry_run)
    print_rows([vars(pruned) for pruned in found], format)
    if vacuum and not dry_run:
        retention.vacuum(db)
    if format is OutputFormat.TABLE:
        rows, kept = sum(p.rows for p in found), sum(p.kept for p in found)
        verb = "would go" if dry_run else "are gone"
        typer.echo(f"{rows:,} step rows of {len(found):,} attempts {verb}, {kept:,} of them stay")
        if rows and not dry_run and not vacuum and sqlite_path(db) is not None:
            typer.echo("the file keeps its size and fills it with new rows; --vacuum shrinks it")


@app.command()
def doctor(
    db: DatabaseOption = DEFAULT_DATABASE,
    spool_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Spools of this host, if elsewhere.")
    ] = None,
    integrity: Annotated[
        bool, typer.Option("--integrity", help="Read the whole SQLite file for damage.")
    ] = False,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Look for what is wrong with a run database, and say what to do about it.

    Schema version, indices, stale leases, statuses, clocks, spools of workers that are gone; for
    SQLite the journal, file system and disk; for PostgreSQL connections and statistics. Exit code
    1 when there is an error.

    Examples
    --------
        srsweep db doctor
        srsweep db doctor --db postgresql://user@host/runs --json
    """
    from db.doctor import examine, worst
    from sweeper.launch_options import default_spool_dir

    format = output_format(as_json, as_csv)
    found = examine(db, spool_dir or default_spool_dir(db), integrity=integrity)
    if format is OutputFormat.TABLE:
        for finding in found:
            typer.echo(f"{finding.level:<8} {finding.check:<12} {finding.text}")
            if finding.remedy:
                typer.echo(f"{'':<8} {'':<12} -> {finding.remedy}")
    else:
        print_rows([vars(finding) for finding in found], format)
    if worst(found) == "error":
        raise typer.Exit(1)


@app.command()
def grant(
    role: Annotated[Role, typer.Argument(help="What the user may do.")],
    user: Annotated[
        str, typer.Argument(metavar="USER", help="A user of the server, or a new one.")
    ],
    db: DatabaseOption = DEFAULT_DATABASE,
    set_password: Annotated[
        bool, typer.Option("--set-password", help="Make the user, or change the password.")
    ] = False,
) -> None:
    """Let a user of a PostgreSQL server read, or read and write, the runs, and no more.

    A writer is what drivers and workers need. The password is asked for, read from standard input
    or taken from SRSWEEP_GRANT_PASSWORD. Repeat the line after an upgrade of the schema.

    Examples
    --------
        srsweep db grant reader alice --set-password --db postgresql://owner@host/runs
        srsweep db grant writer sweeper --db postgresql://owner@host/runs
    """
    from db.grants import grant as give

    password = _new_password(user) if set_password else None
    for line in give(db, role.value, user, password=password):
        typer.echo(line)


def _new_password(user: str) -> str:
    if _PASSWORD_VARIABLE in os.environ:
        password = os.environ[_PASSWORD_VARIABLE]
    elif sys.stdin.isatty():
        password = typer.prompt(
            f"New password of {user}", hide_input=True, confirmation_prompt=True
        )
    else:
        password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise StoreError(f"the new password of {user} is empty")
    return password
