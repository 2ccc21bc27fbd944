"""`srsweep baselines`: rankings without training beside a trained one."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from db.measures import EvaluationRecord, metric_column
from db.spec import RunSpec, RunStatus
from sweeper.cli.options import (
    DEFAULT_DATA_DIR,
    CsvOption,
    DataDirOption,
    JsonOption,
    OutputFormat,
    output_format,
    print_rows,
)
from sweeper.cli.train import (
    choose_device,
    find_dataset,
    spec_from_options,
    with_spec_options,
)
from sweeper.cli.train_display import Progress

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

_SHOWN = ("ndcg", "hit_rate", "coverage", "surprisal")
_K = 10


def baselines_command(
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    train_model: Annotated[
        bool, typer.Option("--train/--no-train", help="Train a model to compare with.")
    ] = True,
    json: JsonOption = False,
    csv: CsvOption = False,
    **fields: Any,
) -> None:
    """Compare most-popular and last-item Markov with a trained model, on the same test users.

    The options of `srsweep train` say what is trained: SASRec with ce by default. Metrics are at
    10, over the whole catalog, with standard errors over users; how far the
    model is ahead is in standard errors of the difference, taken as if independent.

    Examples
    --------
        srsweep baselines --dataset movietweetings --embedding-dim 64 --max-seq-len 64
        srsweep baselines --dataset movietweetings --no-train --csv
    """
    shown = output_format(json, csv)
    dataset = find_dataset(fields.pop("dataset"), data_dir)
    spec = spec_from_options(dataset.name, fields)
    rows = baseline_rows(spec, dataset)
    if train_model:
        rows.append(model_row(spec, dataset, choose_device(device)))
        trained = rows[-1]
        for row in rows[:-1]:
            row |= _margin(trained, row)
    if shown is OutputFormat.TABLE:
        rows = [_readable(row) for row in rows]
    print_rows(rows, shown, columns=list(dict.fromkeys(name for row in rows for name in row)))


def baseline_rows(spec: RunSpec, dataset: "Dataset") -> list[dict[str, Any]]:
    """Test metrics of both baselines, ranked as the run would rank: one row each.

    Parameters
    ----------
    spec : RunSpec
        Of it, `mask_seen` and `metric_frame` are read.
    dataset : Dataset
    """
    import torch

    from trainer.assembly import evaluator
    from trainer.baselines import last_item_markov, most_popular
    from trainer.data.batches import item_tensor

    items = item_tensor(dataset.items, torch.device("cpu"))
    test = evaluator(spec, items, dataset, "test")
    scorers = {
        "most popular": most_popular(dataset),
        "last-item Markov": last_item_markov(dataset, dataset.test),
    }
    return [
        _row(name, test.records(test.rank(scorer, dataset.num_items), step=0, epoch=0))
        for name, scorer in scorers.items()
    ]


def model_row(spec: RunSpec, dataset: "Dataset", device: str) -> dict[str, Any]:
    """Test metrics of a trained model as one row.

    Raises
    ------
    typer.Exit
        Training did not come to its end.
    """
    from trainer.loop import train

    name = f"{spec.model}, {spec.loss}"
    with Progress(spec, len(dataset.train)) as display:
        result = train(spec, dataset, display, device)
    if result.status is not RunStatus.DONE:
        typer.echo(f"{name}: {result.status.value}: {result.error}", err=True)
        raise typer.Exit(1)
    row: dict[str, Any] = {"ranked by": name}
    for metric in _SHOWN:
        column = metric_column(metric, _K)
        row[column] = result.test[column]
        row[f"{column}_se"] = result.test[f"{column}_se"]
    return row


def _row(name: str, records: list[EvaluationRecord]) -> dict[str, Any]:
    row: dict[str, Any] = {"ranked by": name}
    for record in records:
        if record.metric in _SHOWN and record.k == _K:
            column = metric_column(record.metric, record.k)
            row[column], row[f"{column}_se"] = record.value, record.standard_error
    return row


def _margin(trained: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """How far the model is ahead in NDCG@10, in standard errors of the difference."""
    column = metric_column("ndcg", _K)
    difference = trained[column] - row[column]
    # errors as if independent: paired ones would be smaller, so this understates the lead
    error = (trained[f"{column}_se"] ** 2 + row[f"{column}_se"] ** 2) ** 0.5
    return {"model_ahead_by_se": difference / error if error else None}


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"ranked by": row["ranked by"]}
    for metric in _SHOWN:
        column = metric_column(metric, _K)
        value, error = row[column], row[f"{column}_se"]
        shown[column] = "-" if value is None else f"{value:.4f} +- {error or 0.0:.4f}"
    ahead = row.get("model_ahead_by_se")
    shown["model ahead by"] = "" if ahead is None else f"{ahead:.1f} SE"
    return shown


baselines = with_spec_options(baselines_command)
