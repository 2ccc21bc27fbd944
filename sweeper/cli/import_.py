"""`srsweep import`: other people's runs become rows like one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from db.errors import TransferError
from sweeper.cli.options import DEFAULT_DATABASE, DatabaseOption

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE")]
SweepOption = Annotated[
    str | None, typer.Option("--sweep", help="Sweep to list the runs under; the file's name.")
]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", metavar="NAME", help="Where the runs are from, if no column says so."),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="THEIRS=OURS", help="Their column name and ours; repeatable."),
]
UnitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--unit", metavar="OURS=UNIT", help="Unit of a column: GiB, MB, ms ...; repeatable."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OURS=VALUE", help="One value for every row; repeatable."),
]


@app.callback()
def import_() -> None:
    """Take other people's runs into the run database; importing twice changes nothing.

    Examples
    --------
        srsweep import paper experiments.csv
        srsweep import paper data.xlsx --db sqlite:///paper.db
        srsweep import csv theirs.csv --source theirs --map bs=batch_size --map ndcg=ndcg_at_10
    """


@app.command()
def paper(
    file: FileArgument, db: DatabaseOption = DEFAULT_DATABASE, sweep: SweepOption = None
) -> None:
    """Import the runs that the paper published: experiments.csv or data.xlsx with loss curves.

    Repeated points become replicates; memory and time are marked as published, because they mix
    training and evaluation.

    Examples
    --------
        srsweep import paper experiments.csv
        srsweep import paper data.xlsx --db sqlite:///paper.db
    """
    from db.transfer_paper import import_paper

    counts, found = import_paper(db, file, sweep=sweep)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(
        f"{counts.new} runs and {counts.steps} steps imported, {counts.known} runs known before"
    )


@app.command("csv")
def import_csv(
    file: FileArgument,
    db: DatabaseOption = DEFAULT_DATABASE,
    source: SourceOption = None,
    sweep: SweepOption = None,
    map_: MapOption = None,
    unit: UnitOption = None,
    set_: SetOption = None,
) -> None:
    """Import runs from a CSV file: one of srsweep export, or any other with a column mapping.

    Examples
    --------
        srsweep import csv runs.csv
        srsweep import csv theirs.csv --source theirs --map bs=batch_size --map sl=max_seq_len --map mem=peak_train_memory_bytes --unit peak_train_memory_bytes=GiB --set dataset=ml --set loss=ce
    """  # noqa: E501
    _import_table(file, db, source, sweep, map_, unit, set_)


@app.command("parquet")
def import_parquet(
    file: FileArgument,
    db: DatabaseOption = DEFAULT_DATABASE,
    source: SourceOption = None,
    sweep: SweepOption = None,
    map_: MapOption = None,
    unit: UnitOption = None,
    set_: SetOption = None,
) -> None:
    """Import runs from a Parquet file; options as for CSV.

    Examples
    --------
        srsweep import parquet runs.parquet
    """
    if file.suffix != ".parquet":
        raise TransferError(f"{file.name} does not end in .parquet; 'import csv' reads CSV files")
    _import_table(file, db, source, sweep, map_, unit, set_)


def _import_table(
    file: Path,
    db: str,
    source: str | None,
    sweep: str | None,
    map_: Sequence[str] | None,
    unit: Sequence[str] | None,
    set_: Sequence[str] | None,
) -> None:
    from db.transfer import ColumnMapping, import_table

    mapping = ColumnMapping(
        columns=_pairs("--map", map_), units=_pairs("--unit", unit), values=_pairs("--set", set_)
    )
    found = import_table(db, file, source=source, sweep=sweep, mapping=mapping)
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{found.counts.new} runs imported, {found.counts.known} known before")


def _pairs(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    out = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise TransferError(f"{option} {text!r} is no pair; write it as NAME=VALUE")
        out[name] = value
    return out
