"""`srsweep train --profile`: what takes the memory and the time of a training step."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from db.spec import RunSpec
from sweeper.cli.options import OutputFormat, format_value, print_rows

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.profile import StepProfile


def show_profile(
    spec: RunSpec,
    dataset: "Dataset",
    device: str,
    folder: Path | None,
    shown: OutputFormat,
) -> None:
    """Profile some steps of a run, print the tables and write the picture.

    Parameters
    ----------
    spec : RunSpec
        With its precision resolved.
    dataset : Dataset
    device : str
    folder : Path, optional
        Where the picture and its CSV go.
    shown : OutputFormat
    """
    from trainer.profile import profile

    found = profile(spec, dataset, device)
    rows = profile_rows(found)
    if shown is not OutputFormat.TABLE:
        print_rows(rows, shown)
    else:
        _print_tables(found, rows)
    if folder is not None:
        from sweeper.profile_plots import write_profile

        title = f"{spec.model}, {spec.loss}, bs {spec.batch_size}, sl {spec.max_seq_len}"
        if spec.num_negatives is not None:
            title += f", ns {spec.num_negatives}"
        for path in write_profile(found, rows, folder, f"{title}, V {dataset.num_items:,}"):
            if shown is OutputFormat.TABLE:
                print(f"written: {path}")


def profile_rows(found: "StepProfile") -> list[dict[str, Any]]:
    """One row per part of memory and phase of time.

    Columns are `kind` (step_memory, evaluation_memory, step_time), `part`, `bytes` or `seconds`,
    and `share` of its kind; measured peaks have no share.
    """
    total = sum(found.step_bytes.values())
    rows = [
        _row("step_memory", part, size=size, share=size / total)
        for part, size in found.step_bytes.items()
    ]
    rows.append(_row("step_memory", "all tensors", size=total, share=1.0))
    rows.append(_row("step_memory", "measured peak", size=found.measured_step_bytes))
    held = found.step_bytes["parameters"] + found.step_bytes["optimizer state"]
    rows.append(_row("evaluation_memory", "parameters and optimizer state", size=held))
    rows.append(_row("evaluation_memory", "evaluation", size=found.evaluation_bytes))
    rows.append(_row("evaluation_memory", "measured peak", size=found.measured_evaluation_bytes))
    phases = sum(found.phase_seconds.values())
    rows += [
        _row("step_time", phase, seconds=seconds, share=seconds / phases)
        for phase, seconds in found.phase_seconds.items()
    ]
    rows.append(_row("step_time", "whole step", seconds=found.step_seconds))
    return rows


def _row(
    kind: str,
    part: str,
    *,
    size: int | None = None,
    seconds: float | None = None,
    share: float | None = None,
) -> dict[str, Any]:
    return {"kind": kind, "part": part, "bytes": size, "seconds": seconds, "share": share}


_TITLES = {
    "step_memory": "Memory of a training step, when its tensors take most",
    "evaluation_memory": "Memory of evaluation",
    "step_time": "Time of a training step",
}


def _print_tables(found: "StepProfile", rows: list[dict[str, Any]]) -> None:
    for kind, title in _TITLES.items():
        lines = []
        for row in rows:
            if row["kind"] != kind:
                continue
            seconds = row["seconds"]
            lines.append(
                {
                    "part": row["part"],
                    "value": f"{seconds * 1000:,.2f} ms"
                    if seconds is not None
                    else format_value("peak_bytes", row["bytes"]),
                    "share": "" if row["share"] is None else f"{row['share']:.1%}",
                }
            )
        print_rows(lines, title=title)
        print()
    print(
        f"{found.tokens_per_second:,.0f} valid tokens per second over {found.num_steps} steps; "
        f"{found.num_parameters:,} parameters; measured peaks are {found.memory_source}"
    )
