"""`srsweep train`: one run, without Ray."""

import ast
import inspect
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from db.errors import DataError, LostLeaseError, SpecError, SrsweepError
from db.measures import (
    MEASURES,
    METRICS,
    RunResult,
    metric_column,
)
from db.spec import RunSpec, RunStatus, field_docs, field_types, paper_profile
from sweeper.cli.options import (
    DEFAULT_DATA_DIR,
    CsvOption,
    DataDirOption,
    JsonOption,
    OutputFormat,
    format_value,
    output_format,
    print_rows,
)
from sweeper.cli.profile import show_profile
from sweeper.cli.train_display import BothRecorders, Progress

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset

SHOWN_KS = (1, 5, 10, 20, 100)
_SWEEP = "train"


def train_command(
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Start from the oddities of the paper's code, not without."),
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    db: Annotated[
        str | None,
        typer.Option("--db", metavar="URL", help="Record the run in this run database."),
    ] = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep a checkpoint here and resume from it."),
    ] = None,
    checkpoint_minutes: Annotated[
        float, typer.Option(min=0.0, help="Minutes between checkpoints.")
    ] = 10.0,
    step_rows_every: Annotated[int, typer.Option(min=1, help="Record every so many steps.")] = 1,
    histograms_every: Annotated[
        int | None,
        typer.Option(min=1, help="Record histograms of the final layer's gradients so often."),
    ] = None,
    keep_model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the best weights here, for export-model."),
    ] = None,
    from_model: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FOLDER", help="Start from an exported model; new items are added."
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Take a few steps only, and say what takes their memory and time."
        ),
    ] = False,
    profile_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="With --profile: write its picture and CSV here."),
    ] = None,
    json: JsonOption = False,
    csv: CsvOption = False,
    **fields: Any,
) -> None:
    """Train one run and print what it cost and how well it ranks.

    Options named like a field of a run set that field; all others keep their defaults. Nothing is
    stored unless --db names a run database.

    Examples
    --------
        srsweep train --dataset movietweetings --embedding-dim 64 --max-seq-len 64
        srsweep train --dataset data/ml-1m --loss cce_minus --num-negatives 255 --device cuda
        srsweep train --dataset movietweetings --paper --loss cce --db sqlite:///srsweep.db
        srsweep train --dataset movietweetings --batch-size 512 --profile --profile-dir profiles
        srsweep train --dataset ml-2026-11 --from served/ml-2026-10 --max-epochs 3
    """
    shown = output_format(json, csv)
    dataset = find_dataset(fields.pop("dataset"), data_dir)
    spec = spec_from_options(dataset.name, fields, paper=paper)
    device = choose_device(device)
    spec = spec.resolved(device.partition(":")[0])
    if profile or profile_dir is not None:
        show_profile(spec, dataset, device, profile_dir, shown)
        return
    from trainer.loop import TrainOptions, train

    initialise = None
    if from_model is not None:
        if db is not None:
            raise SpecError(
                "--from cannot go with --db: the database knows runs by their settings, and what "
                "a run started from is none of them; leave one out"
            )
        initialise, digest = _started_from(from_model, spec, dataset)
        # another start is another run: it must not resume this one's checkpoint
        checkpoint_dir = checkpoint_dir and checkpoint_dir / f"from-{digest}"
    options = TrainOptions(
        step_rows_every=step_rows_every,
        histograms_every=histograms_every,
        checkpoint_dir=checkpoint_dir,
        checkpoint_minutes=checkpoint_minutes,
        on_trained=_keeper(keep_model, spec, dataset) if keep_model else None,
    )
    with Progress(spec, len(dataset.train)) as display:
        if db is None:
            result = train(spec, dataset, display, device, options=options, initialise=initialise)
        else:
            result = _train_recorded(spec, dataset, display, device, options, db)
    print_result(spec, result, shown)
    if result.status is not RunStatus.DONE:
        raise typer.Exit(1)


def _started_from(folder: Path, spec: RunSpec, dataset: "Dataset") -> tuple[Any, str]:
    """What sets a new model to an exported one's weights, and the digest of those."""
    from trainer.export import load_exported_model, start_from

    saved = load_exported_model(folder)

    def initialise(model: Any) -> None:
        new = start_from(model, spec, saved, dataset.item_ids)
        print(
            f"starting from {folder}: {dataset.num_items - new:,} of its {saved.num_items:,} "
            f"items, {new:,} new ones",
            file=sys.stderr,
        )

    return initialise, saved.digest()


def _keeper(path: Path, spec: RunSpec, dataset: "Dataset") -> Any:
    """What writes a trained model to a file."""
    from trainer.export import keep_model

    return lambda model, result: keep_model(path, model, spec, dataset, result)


def spec_options() -> list[inspect.Parameter]:
    """A typer option for every field of `RunSpec`: its name, type, values and doc string."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=_annotation(name),
            default=... if name == "dataset" else None,
        )
        for name in field_types()
    ]


def _annotation(name: str) -> Any:
    kind = field_types()[name]
    default = RunSpec.__dataclass_fields__[name].default
    help_text = field_docs()[name].replace("`", "")
    flag = "--" + name.replace("_", "-")
    if name == "dataset":
        text = "Prepared dataset: its name under --data-dir, or its folder."
        return Annotated[str, typer.Option(flag, metavar="NAME", help=text)]
    stated = "null" if default is None else str(default).lower() if kind is bool else default
    help_text = f"{help_text} [default: {stated}]"
    if kind is bool:
        flags = f"{flag}/--no-{name.replace('_', '-')}"
        return Annotated[bool | None, typer.Option(flags, help=help_text)]
    return Annotated[str | None, typer.Option(flag, metavar=_metavar(kind), help=help_text)]


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    parts = []
    for option in typing.get_args(kind) or (kind,):
        if typing.get_origin(option) is Literal:
            parts.append(_metavar(option))
        elif option is not type(None):
            parts.append({int: "N", float: "X", str: "TEXT"}[option])
    return "|".join(parts)


def spec_from_options(dataset: str, fields: dict[str, Any], *, paper: bool = False) -> RunSpec:
    """Run spec from what was typed.

    Parameters
    ----------
    dataset : str
        Name of the dataset.
    fields : dict
        Field name to text, or to a bool for flags; None where nothing was typed.
    paper : bool
        Whether fields that were not typed follow the paper's code (`db.spec.paper_profile`).

    Raises
    ------
    SpecError
        A value that its field cannot take.
    """
    typed = {
        name: value if isinstance(value, bool) else _parse(name, value)
        for name, value in fields.items()
        if value is not None
    }
    defaults: dict[str, Any] = {}
    if paper:
        defaults = paper_profile(
            str(typed.get("model", RunSpec.model)), str(typed.get("loss", RunSpec.loss))
        )
    return RunSpec.from_mapping({"dataset": dataset} | defaults | typed)


def _parse(name: str, text: str) -> Any:
    """Number, null or text, whichever the field's type can make of it."""
    kind = field_types()[name]
    kinds = typing.get_args(kind) if typing.get_origin(kind) is not Literal else (kind,)
    kinds = kinds or (kind,)
    if type(None) in kinds and text.lower() in ("null", "none"):
        return None
    if int in kinds or float in kinds:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
        return value if type(value) in (int, float) else text
    return text


def find_dataset(name: str, data_dir: Path) -> "Dataset":
    """Open a prepared dataset by its name or its folder.

    Raises
    ------
    DataError
        There is none; the text says how to make one.
    """
    from trainer.data.dataset import load_dataset

    folder = data_dir / name
    if not folder.is_dir():
        folder = Path(name)
    if not folder.is_dir():
        there = sorted(path.parent.name for path in data_dir.glob("*/dataset.json"))
        raise DataError(
            f"dataset {name!r} is neither prepared in {data_dir} nor a folder"
            + (f" (there: {', '.join(there)})" if there else "")
            + f"; make it with 'srsweep prepare --source ... --out {data_dir / name}'"
        )
    return load_dataset(folder)


def choose_device(name: str) -> str:
    """Device that `auto` stands for; any other name as it is.

    Raises
    ------
    SpecError
        A name that torch does not know.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(name)
    except RuntimeError:
        raise SpecError(f"device={name!r} is unknown; use cpu, cuda, cuda:N or auto") from None
    return name


def _train_recorded(
    spec: RunSpec, dataset: "Dataset", display: Progress, device: str, options: Any, url: str
) -> RunResult:
    """Train as the only run of a sweep named `train`, every row written as it comes."""
    import os

    from db.store import PlannedRun, RunStore, WorkerInfo
    from sweeper.datasets import dataset_record
    from sweeper.device import device_class, git_commit, host_name, package_versions
    from sweeper.launch_options import default_spool_dir
    from trainer.loop import train

    store = RunStore.open(url)
    run = PlannedRun(spec=spec, fingerprint=dataset.fingerprint)
    store.put_dataset(dataset_record(dataset))
    store.put_sweep(_SWEEP, spec.command(), [run])
    name, memory = device_class(device)
    worker = WorkerInfo(
        host=host_name(),
        pid=os.getpid(),
        device_class=name,
        device_memory_bytes=memory,
        timing="exclusive",
        versions=package_versions(),
        git_commit=git_commit(),
    )
    claim = store.claim(run.key, worker)
    if claim is None:
        status = store.run(run.key).status.value
        raise SrsweepError(
            f"run {run.key[:12]} is {status} in the database already; see it with 'srsweep runs', "
            "or train with another seed"
        )
    with store.writer(claim, spool_dir=default_spool_dir(url)) as writer:
        try:
            result = train(spec, dataset, BothRecorders(writer, display), device, options=options)
        except LostLeaseError:
            raise
        except (KeyboardInterrupt, SystemExit):
            writer.cancel()
            raise
        except Exception as error:
            writer.fail(type(error).__name__, " ".join(str(error).split())[:2000])
            raise
        writer.finish(result)
    return result


def print_result(spec: RunSpec, result: RunResult, shown: OutputFormat) -> None:
    """Print test metrics with their standard errors, and what the run cost."""
    row = result_row(spec, result)
    if shown is not OutputFormat.TABLE:
        print_rows([row], shown)
        return
    end = f" ({result.stop_reason})" if result.stop_reason else ""
    print(f"{result.status.value}{end} after {result.num_steps} steps, {result.num_epochs} epochs")
    if result.error:
        print(result.error)
    if result.test:
        print(f"test, with the weights of step {result.best_step}:")
        metrics = []
        for metric in METRICS:
            line = {"metric": MEASURES[metric_column(metric, 10)].label.partition("@")[0]}
            for k in SHOWN_KS:
                line[f"@{k}"] = _with_error(result, metric_column(metric, k))
            metrics.append(line)
        print_rows(metrics)
    costs = [
        {
            "measured": measure.label.partition(",")[0],
            "value": _in_display_unit(name, getattr(result, name)),
        }
        for name, measure in MEASURES.items()
        if hasattr(result, name)
    ]
    costs.append({"measured": "Steps timed", "value": f"{num_timed_steps(result):,}"})
    costs.append({"measured": "Parameters", "value": f"{result.num_parameters:,}"})
    costs.append({"measured": "Memory is", "value": result.memory_source})
    print_rows(costs)


def num_timed_steps(result: RunResult) -> int:
    """Steps that the median step time and the throughput rest on; the first few warm up."""
    from trainer.outcome import WARM_UP_STEPS

    left = result.num_steps - WARM_UP_STEPS
    return left if left > 0 else result.num_steps


def result_row(spec: RunSpec, result: RunResult) -> dict[str, Any]:
    """Everything about a run in one flat row: its fields, costs, test and validation metrics."""
    scalars = {
        name: value
        for name, value in vars(result).items()
        if name not in ("test", "validation", "status")
    }
    validation = {f"validation_{name}": value for name, value in result.validation.items()}
    return (
        spec.to_dict() | {"status": result.status.value} | scalars | dict(result.test) | validation
    )


def _with_error(result: RunResult, column: str) -> str:
    value, error = result.test.get(column), result.test.get(f"{column}_se")
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _in_display_unit(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return format_value(name, int(value))
    if name == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value * 1000:.2f} ms" if name == "step_seconds" else f"{value:.2f} s"


def with_spec_options(function: Any) -> Any:
    """Give a command that takes **fields an option for every field of a run.

    Parameters
    ----------
    function : callable
        Its other parameters keep their options.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    dataset, *others = spec_options()
    kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [dataset, *kept, *others]
    function.__signature__ = signature.replace(parameters=parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return function


train = with_spec_options(train_command)
