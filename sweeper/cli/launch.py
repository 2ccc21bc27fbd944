"""`srsweep launch`: run every point of a grid."""

import dataclasses
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from db.errors import LaunchError
from sweeper.cli.options import (
    DEFAULT_DATA_DIR,
    DEFAULT_DATABASE,
    DatabaseOption,
    DataDirOption,
)

if TYPE_CHECKING:
    from sweeper.grid import Grid


class Timing(enum.StrEnum):
    """Whether runs have their GPU to themselves."""

    EXCLUSIVE = "exclusive"
    SHARED = "shared"


def launch(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="YAML file with the grid.")],
    db: DatabaseOption = DEFAULT_DATABASE,
    data_dir: DataDirOption = DEFAULT_DATA_DIR,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the points and start nothing.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Ray cluster to run on; without it a local Ray is started."
        ),
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(min=1, help="CPU cores of this machine to use.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs of this machine to use.")] = None,
    cpus_per_run: Annotated[
        float | None, typer.Option(min=0.01, help="CPU cores of each run; replaces the grid's.")
    ] = None,
    gpus_per_run: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each run, a fraction shares one; replaces the grid's."),
    ] = None,
    timing: Annotated[
        Timing | None,
        typer.Option(
            help="exclusive: each run has a GPU to itself, its times are results; shared: runs "
            "share GPUs by predicted memory; replaces the grid's."
        ),
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Most runs at a time.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="Longest time of one run.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try runs that failed before once more.")
    ] = False,
    retry_out_of_memory: Annotated[
        bool,
        typer.Option(
            "--retry-out-of-memory",
            help="Try runs again that did not fit, and those skipped for it, on a larger device.",
        ),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune/--no-prune",
            help="Skip points that need at least the memory of one that ran out of it.",
        ),
    ] = True,
    send_datasets: Annotated[
        bool,
        typer.Option(
            "--send-datasets",
            help="Send prepared datasets to nodes of the cluster that do not have them.",
        ),
    ] = False,
    early_stopping: Annotated[
        bool,
        typer.Option(
            "--early-stopping/--no-early-stopping",
            help="Let the scheduler that the grid names cut runs short; without, they are carried "
            "to their end, and those that were cut as well.",
        ),
    ] = True,
    stall_seconds: Annotated[
        float,
        typer.Option(min=1, help="A run that reports no step or evaluation for so long is ended."),
    ] = 1800.0,
    step_rows_every: Annotated[int, typer.Option(min=1, help="Store every so many steps.")] = 1,
    lease_seconds: Annotated[
        float, typer.Option(min=2, help="Silence after which a worker counts as lost.")
    ] = 60.0,
    max_points: Annotated[
        int | None, typer.Option(min=1, help="Refuse a grid with more points.")
    ] = None,
) -> None:
    """Run every point of a grid; the same line again runs only what is missing.

    Runs are identified by their content: what another sweep has finished is not run again. Killed
    or interrupted at any moment, the same line resumes; two launches at once share the work. The
    exit code is 0 when every run has a result, 1 when some failed or are missing.

    Examples
    --------
        srsweep launch grids/demo.yaml
        srsweep launch grids/demo.yaml --dry-run
        srsweep launch grids/demo.yaml --cpus-per-run 2 --max-concurrent 4
        srsweep launch grids/demo.yaml --timing shared
        srsweep launch grids/demo.yaml --address head:6379 --db postgresql://user@host/runs
    """
    from sweeper.grid import MAX_POINTS, load_grid

    loaded = load_grid(grid, max_points=max_points or MAX_POINTS)
    if dry_run:
        show_points(loaded)
        return
    resources = loaded.resources
    changes: dict[str, Any] = {
        "cpus": cpus_per_run,
        "gpus": gpus_per_run,
        "time_limit_seconds": time_limit,
        "timing": timing and timing.value,
    }
    resources = dataclasses.replace(
        resources, **{name: value for name, value in changes.items() if value is not None}
    )
    if resources.gpus and resources.gpus > 1 and resources.gpus % 1:
        raise LaunchError(f"--gpus-per-run {resources.gpus} must be a fraction up to 1 or whole")

    from sweeper.launch import launch as launch_grid
    from sweeper.launch_options import LaunchOptions
    from sweeper.progress import open_display

    options = LaunchOptions(
        database=db,
        data_dir=data_dir,
        address=address,
        resources=resources,
        cpus=cpus,
        gpus=gpus,
        max_concurrent=max_concurrent,
        retry_failed=retry_failed,
        retry_out_of_memory=retry_out_of_memory,
        prune=prune,
        send_datasets=send_datasets,
        early_stopping=early_stopping,
        stall_seconds=stall_seconds,
        step_rows_every=step_rows_every,
        lease_seconds=lease_seconds,
    )
    with open_display() as display:
        for note in loaded.notes:
            display.note(note)
        outcome = launch_grid(loaded, options, display)
        display.note(f"{loaded.name}: {outcome.snapshot.text()}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def show_points(grid: "Grid") -> None:
    """Print the points of a grid and what was left out."""
    for spec in grid.points:
        typer.echo(", ".join(f"{name}={value}" for name, value in spec.non_default().items()))
    left_out = {
        "duplicates": grid.num_duplicates,
        "excluded": grid.num_excluded,
        "without meaning for their loss": grid.num_conditional,
    }
    text = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
    typer.echo(
        f"{grid.name}: {len(grid.points):,} points" + (f" (left out: {text})" if text else "")
    )
    for note in grid.notes:
        typer.echo(note)
