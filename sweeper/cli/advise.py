"""`srsweep advise`: which setting to train under a budget."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from db.errors import SearchError
from sweeper.cli.options import (
    DEFAULT_DATABASE,
    CsvOption,
    DatabaseOption,
    JsonOption,
    OutputFormat,
    output_format,
    print_rows,
)

if TYPE_CHECKING:
    from sweeper.advice import Advice, AdvisedPoint, Estimate

_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
          "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip
_SECONDS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def advise(
    memory: Annotated[str, typer.Option(help="Device memory to stay within, e.g. 24GiB.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    time: Annotated[
        str | None, typer.Option(help="Training time of a run to stay within, e.g. 8h or 90min.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Dataset with runs in the database; the only one if left out."),
    ] = None,
    num_items: Annotated[
        int | None, typer.Option(min=2, help="Catalog size of a dataset without runs.")
    ] = None,
    mean_length: Annotated[
        float | None, typer.Option(min=1, help="Mean items per user of a dataset without runs.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device class; the one with most runs if left out.")
    ] = None,
    num_next: Annotated[int, typer.Option(min=0, help="Next runs to suggest.")] = 3,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Show the best settings under a budget, what they rest on, and the next runs worth doing.

    Quality, memory and time come with 90 % intervals; a line marked 'predicted' was never run.
    A dataset without runs is described by its sizes, and quality is then a share of the best that
    the dataset allows.

    Examples
    --------
        srsweep advise --memory 24GiB --dataset movietweetings
        srsweep advise --memory 24GiB --time 8h --dataset movietweetings
        srsweep advise --memory 40GiB --num-items 500000 --mean-length 80
    """
    from sweeper.advice import Budget
    from sweeper.advise import advise
    from sweeper.advise_new import advise_new
    from sweeper.memory_model import Shape
    from sweeper.search.history import read_history

    format = output_format(as_json, as_csv)
    budget = Budget(parse_bytes(memory), None if time is None else parse_seconds(time))
    if (num_items is None) != (mean_length is None):
        raise SearchError("--num-items and --mean-length belong together; give both or neither")
    if num_items is not None and dataset is not None:
        raise SearchError(
            "--dataset names a dataset with runs, --num-items describes one without; give one"
        )
    history = read_history(db)
    devices = history.device_classes()
    history = history.on_device(device)
    if num_items is not None and mean_length is not None:
        found = advise_new(history, Shape(num_items, mean_length), budget)
    else:
        found = advise(history, _dataset(dataset, list(history.runs)), budget, num_next=num_next)
    _print(found, format)
    if format is OutputFormat.TABLE and device is None and len(devices) > 1:
        typer.echo(f"note: {len(devices)} device classes are known; --device chooses another")


def parse_bytes(text: str) -> float:
    """Bytes of a size such as `24GiB` or `500MB`.

    Raises
    ------
    SearchError
        Not a size.
    """
    return _quantity(text, _BYTES, "memory", "24GiB")


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `8h`, `90min` or `45s`.

    Raises
    ------
    SearchError
        Not a duration.
    """
    return _quantity(text, _SECONDS, "time", "8h")


def _quantity(text: str, units: dict[str, int], what: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in units:
        raise SearchError(f"--{what} {text!r} is not a {what}; give a number and a unit: {example}")
    return float(found[1]) * units[found[2].lower()]


def _dataset(name: str | None, known: Sequence[str]) -> str:
    from db.spec import suggestion

    if name is None:
        if len(known) == 1:
            return known[0]
        if not known:
            raise SearchError("the database holds no runs; launch a sweep first")
        listed = ", ".join(sorted(known))
        raise SearchError(f"the database holds runs on several datasets ({listed}); give --dataset")
    if name not in known:
        raise SearchError(f"no runs on dataset {name!r}{suggestion(name, known)}")
    return name


def _print(advice: "Advice", format: OutputFormat) -> None:
    rows = [_row(point, advice) for point in advice.points]
    if format is not OutputFormat.TABLE:
        print_rows(rows, format)
        return
    quality = "share of the dataset's best NDCG@10" if advice.relative else "NDCG@10"
    typer.echo(f"{advice.dataset}: {quality}, from {advice.num_runs} finished runs")
    print_rows([_shown(point, advice) for point in advice.points])
    best = advice.best
    typer.echo(f"\nbest under the budget: {best.spec.command()}")
    typer.echo("  rests on runs " + ", ".join(key[:12] for key in best.rests_on))
    for spec in advice.next_runs:
        typer.echo(f"next run: {spec.command()}")
    for note in advice.notes:
        typer.echo(f"note: {note}")


def _row(point: "AdvisedPoint", advice: "Advice") -> dict[str, Any]:
    name = "relative_ndcg_at_10" if advice.relative else "ndcg_at_10"
    row: dict[str, Any] = {
        "model": point.spec.model,
        "loss": point.spec.loss,
        "batch_size": point.spec.batch_size,
        "max_seq_len": point.spec.max_seq_len,
        "num_negatives": point.spec.num_negatives,
    }
    for column, estimate in (
        (name, point.quality),
        ("peak_train_memory_bytes", point.memory),
        ("train_seconds", point.seconds),
    ):
        row[column] = None if estimate is None else estimate.value
        row[f"{column}_low"] = None if estimate is None else estimate.low
        row[f"{column}_high"] = None if estimate is None else estimate.high
    distance = point.doublings if math.isfinite(point.doublings) else None
    return row | {
        "chance_to_fit": point.fits,
        "measured": point.measured,
        "doublings_from_nearest_run": distance,
        "extrapolates": "; ".join(point.extrapolates),
        "rests_on": " ".join(point.rests_on),
    }


def _shown(point: "AdvisedPoint", advice: "Advice") -> dict[str, str]:
    spec = point.spec
    return {
        "model": spec.model,
        "loss": spec.loss,
        "bs": str(spec.batch_size),
        "sl": str(spec.max_seq_len),
        "ns": "all" if spec.num_negatives is None else str(spec.num_negatives),
        "quality": _interval(point.quality, 1, ".4f"),
        "memory, GiB": _interval(point.memory, 2**30, ".3g"),
        "time, min": "-" if point.seconds is None else _interval(point.seconds, 60, ".3g"),
        "fits": f"{100 * point.fits:.0f} %",
        "basis": "measured" if point.measured else f"predicted, {point.doublings:g} doublings away",
        "outside": "; ".join(point.extrapolates),
    }


def _interval(estimate: "Estimate", scale: float, format: str) -> str:
    value, low, high = (x / scale for x in (estimate.value, estimate.low, estimate.high))
    if low == high:
        return f"{value:{format}}"
    return f"{value:{format}} [{low:{format}}, {high:{format}}]"
