"""`srsweep prepare`: from a file of interactions to a dataset that training opens."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sweeper.cli.options import JsonOption
from trainer.data.checks import DEFAULT_MAX_BAD_ROWS
from trainer.data.prepare import DEFAULT_MEMORY_ROWS
from trainer.data.split import FilterOptions, SplitOptions, TieOrder


def prepare(
    source: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Format of --input: movielens, csv, parquet, amazon2014, amazon2018, amazon2023, "
            "gowalla, zvuk, 30music, megamarket, recbole; or a public dataset: ml-100k, ml-1m, "
            "ml-10m, ml-20m, ml-25m, ml-32m, amazon2023-beauty, gowalla.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")],
    input: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File of interactions, plain, gzipped or in its archive."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the dataset; the last part of --out by default.")
    ] = None,
    user_column: Annotated[str | None, typer.Option(help="Column of the users.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of the items.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of the times.")] = None,
    rating_column: Annotated[str | None, typer.Option(help="Column of the ratings.")] = None,
    rating_above: Annotated[
        float | None, typer.Option(help="Keep rows rated higher than this.")
    ] = None,
    event: Annotated[
        int | None, typer.Option(help="Kind of event to keep (megamarket; 2 by default).")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="csv: separator, one character, 'tab' or '::'.")
    ] = None,
    header: Annotated[
        bool,
        typer.Option(help="csv: the first line names the columns; without, give numbers from 1."),
    ] = True,
    id_type: Annotated[
        str | None, typer.Option(help="Ids in text: auto, int or string.", metavar="TYPE")
    ] = None,
    max_bad_rows: Annotated[
        int, typer.Option(min=0, help="Bad rows to leave out before refusing the file.")
    ] = DEFAULT_MAX_BAD_ROWS,
    min_item_count: Annotated[int, typer.Option(min=1, help="Least rows of an item.")] = (
        FilterOptions.min_item_count
    ),
    min_user_count: Annotated[int, typer.Option(min=1, help="Least rows of a user.")] = (
        FilterOptions.min_user_count
    ),
    iterated: Annotated[
        bool, typer.Option("--iterated", help="Repeat both filters until nothing changes.")
    ] = False,
    split: Annotated[
        str, typer.Option(metavar="KIND", help="global-temporal or leave-one-out.")
    ] = "global-temporal",
    test_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the latest rows that test.")
    ] = SplitOptions.test_fraction,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of training users that validate.")
    ] = SplitOptions.validation_fraction,
    tie_order: Annotated[
        str,
        typer.Option(
            metavar="ORDER",
            help="Of two events at the same time the earlier one: row (in the file), or item-age "
            "(on the item that appeared earlier), or item-id (on the item with the lower id).",
        ),
    ] = "row",
    raw_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where downloads are kept.")
    ] = Path("data/raw"),
    memory_rows: Annotated[
        int, typer.Option(min=1, help="Rows held in memory at once; larger inputs use the disk.")
    ] = DEFAULT_MEMORY_ROWS,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is there.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Read interactions, filter, split by time, encode, and write memory-mapped arrays.

    The defaults are the paper's: items with at least 5 rows, then users with at least 3, one pass;
    a cutoff after 90 % of the rows; 5 % of the users validate; the last event is the target.

    Examples
    --------
        srsweep prepare --source movielens --input ratings.dat --out data/ml-1m
        srsweep prepare --source ml-20m --out data/ml-20m
        srsweep prepare --source csv --input clicks.tsv --delimiter tab --user-column visitor
            --item-column sku --time-column at --out data/clicks
        srsweep prepare --source parquet --input events.parquet --split leave-one-out
            --out data/events-loo
    """
    from rich.console import Console

    from db.errors import DataError
    from trainer.data.download import PUBLIC_DATASETS
    from trainer.data.prepare import prepare as prepare_dataset
    from trainer.data.sources import SourceOptions, open_source

    if split not in ("global-temporal", "leave-one-out"):
        raise DataError(f"--split {split!r} is neither global-temporal nor leave-one-out")
    orders: dict[str, TieOrder] = {"row": "row", "item-age": "item_age", "item-id": "item_id"}
    if tie_order not in orders:
        raise DataError(f"--tie-order {tie_order!r} is none of {', '.join(orders)}")
    if id_type not in (None, "auto", "int", "string"):
        raise DataError(f"--id-type {id_type!r} is none of auto, int, string")
    public = PUBLIC_DATASETS.get(source)
    if input is None:
        input = _fetch(source, raw_dir)
    options = SourceOptions(
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column=rating_column,
        rating_above=rating_above,
        delimiter=delimiter,
        header=header,
        event=event,
        id_type=id_type,  # type: ignore[arg-type]
        max_bad_rows=max_bad_rows,
    )
    with Console(stderr=True).status("open") as status:
        dataset = prepare_dataset(
            open_source(
                public.source if public else source,
                input,
                options,
                rating_above=public.rating_above if public else None,
            ),
            out,
            name=name,
            filters=FilterOptions(
                min_item_count=min_item_count, min_user_count=min_user_count, iterated=iterated
            ),
            split=SplitOptions(
                kind="global_temporal" if split == "global-temporal" else "leave_one_out",
                test_fraction=test_fraction,
                validation_fraction=validation_fraction,
                tie_order=orders[tie_order],
            ),
            memory_rows=memory_rows,
            overwrite=overwrite,
            progress=lambda doing: status.update(doing),
        )
    print_summary(dataset.meta, dataset.path, as_json=json)


def print_summary(meta: dict[str, Any], path: Path, *, as_json: bool = False) -> None:
    """Print what was prepared: a few lines, or the whole of `dataset.json`.

    Parameters
    ----------
    meta : dict
        Contents of `dataset.json`.
    path : Path
        The dataset's folder.
    as_json : bool
        Print all of it as JSON.
    """
    for warning in meta["warnings"]:
        print(f"srsweep: warning: {warning}", file=sys.stderr)
    if as_json:
        import json

        print(json.dumps(meta, indent=1))
        return
    counts, lengths = meta["counts"], meta["sequence_length"]
    split = meta["split"]
    print(
        f"{meta['name']}: {counts['filtered_users']:,} users, {counts['filtered_items']:,} items, "
        f"{counts['filtered_rows']:,} interactions ({counts['raw_rows']:,} rows read, "
        f"mean length {lengths['mean']:.1f})"
    )
    print(
        f"catalog {counts['num_items']:,} items of the training events; "
        f"{counts['num_train_users']:,} training, {counts['num_validation_users']:,} validation, "
        f"{counts['num_test_users']:,} test users ({split['kind'].replace('_', ' ')} split)"
    )
    print(f"tied test targets {meta['tied_target_share']['test']:.1%}")
    print(f"written to {path}, fingerprint {meta['fingerprint'][:12]}")


def _fetch(source: str, raw_dir: Path) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from db.errors import DataError
    from trainer.data.download import PUBLIC_DATASETS, locate

    if source not in PUBLIC_DATASETS:
        raise DataError(
            f"--source {source} needs --input FILE; without a file, --source names a public "
            f"dataset: {', '.join(PUBLIC_DATASETS)}"
        )
    print(f"srsweep: terms of use: {PUBLIC_DATASETS[source].terms}", file=sys.stderr)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(source, total=None)
        return locate(
            source,
            raw_dir,
            progress=lambda have, total: bar.update(task, completed=have, total=total),
        )
