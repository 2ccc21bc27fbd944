"""`srsweep data`: list, describe and check prepared datasets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sweeper.cli.options import (
    DEFAULT_DATA_DIR,
    CsvOption,
    DataDirOption,
    JsonOption,
    output_format,
    print_rows,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, describe and check prepared datasets.",
)

_LISTED = (
    "name",
    "users",
    "items",
    "interactions",
    "catalog",
    "test_users",
    "split",
    "fingerprint",
    "note",
)

DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Name under --data-dir, or a folder.")
]


@app.command("list")
def list_datasets(
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    json: JsonOption = False,
    csv: CsvOption = False,
) -> None:
    """List the prepared datasets of a folder.

    Examples
    --------
        srsweep data list
        srsweep data list --data-dir /scratch/data --json
    """
    from db.errors import DataError
    from trainer.data.dataset import META_FILE, load_dataset

    rows: list[dict[str, Any]] = []
    for meta in sorted(data_dir.glob(f"*/{META_FILE}")):
        try:
            dataset = load_dataset(meta.parent)
        except DataError as error:
            rows.append({"name": meta.parent.name, "note": str(error)})
            continue
        counts = dataset.meta["counts"]
        rows.append(
            {
                "name": dataset.name,
                "users": counts["filtered_users"],
                "items": counts["filtered_items"],
                "interactions": counts["filtered_rows"],
                "catalog": dataset.num_items,
                "test_users": len(dataset.test),
                "split": dataset.meta["split"]["kind"],
                "fingerprint": dataset.fingerprint[:12],
                "note": f"{len(dataset.meta['warnings'])} warnings"
                if dataset.meta["warnings"]
                else "",
            }
        )
    print_rows(rows, output_format(json, csv), columns=_LISTED)


@app.command()
def describe(
    dataset: DatasetArgument,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write figures (SVG, PNG) and their CSVs here."),
    ] = None,
    json: JsonOption = False,
    csv: CsvOption = False,
) -> None:
    """Print what to look at before training: lengths, popularity, repeats, ties, cold items, drift.

    Examples
    --------
        srsweep data describe movietweetings
        srsweep data describe data/ml-1m --out figures/ml-1m
    """
    from sweeper.describe_plots import write_figures
    from trainer.data.dataset import load_dataset
    from trainer.data.describe import describe as describe_dataset

    opened = load_dataset(find_dataset(dataset, data_dir))
    description = describe_dataset(opened)
    format = output_format(json, csv)
    print_rows(description.summary, format, title=opened.name)
    if format == "table":
        print()
        print_rows(description.coverage, title="what each max_seq_len keeps of the training rows")
        print()
        print_rows(description.drift, title="drift over periods of equal length")
        for warning in opened.meta["warnings"]:
            print(f"warning: {warning}")
    if out is not None:
        written = write_figures(description, out)
        typer.echo(f"{len(written)} files written to {out}", err=format != "table")


@app.command()
def check(dataset: DatasetArgument, data_dir: DataDirOption = DEFAULT_DATA_DIR) -> None:
    """Read all arrays of a dataset and compare them with the recorded fingerprint.

    Examples
    --------
        srsweep data check movietweetings
    """
    from trainer.data.dataset import check_dataset, load_dataset

    opened = load_dataset(find_dataset(dataset, data_dir))
    check_dataset(opened)
    print(f"{opened.name}: unchanged, fingerprint {opened.fingerprint}")


def find_dataset(name: str, data_dir: Path) -> Path:
    """Folder of a dataset: a path as it stands, or a name under `data_dir`.

    Parameters
    ----------
    name : str
        Name, or path of a folder.
    data_dir : Path
        Folder whose subfolders are prepared datasets.
    """
    path = Path(name)
    return path if path.is_dir() else data_dir / name
