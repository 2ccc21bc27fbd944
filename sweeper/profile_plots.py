"""Picture of a training step: what takes its memory, and what its time."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from db.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainer.profile import StepProfile

_MIB = 2**20
_COLORS = {
    "parameters": "#31688e",
    "optimizer state": "#5ea5c9",
    "gradients": "#9fd0e6",
    "activations": "#7fbf7b",
    "loss": "#d95f02",
    "temporary": "#bdbdbd",
    "evaluation": "#8856a7",
    "batch": "#bdbdbd",
    "network": "#7fbf7b",
    "network backward": "#3f8f4f",
    "optimizer": "#5ea5c9",
}
"""Colors of memory parts and phases; the loss has the same in both."""


def plot_memory(axes: Axes, found: StepProfile) -> Axes:
    """Bars of a training step and an evaluation, stacked by part, with the measured peaks.

    Parameters
    ----------
    axes : Axes
        Drawn on.
    found : StepProfile
    """
    held = {name: found.step_bytes[name] for name in ("parameters", "optimizer state")}
    bars: dict[str, tuple[Mapping[str, int], int]] = {
        "training step": (
            {str(name): size for name, size in found.step_bytes.items()},
            found.measured_step_bytes,
        ),
        "evaluation": (
            {**held, "evaluation": found.evaluation_bytes},
            found.measured_evaluation_bytes,
        ),
    }
    for place, (sizes, measured) in enumerate(bars.values()):
        _stack(axes, place, {name: size / _MIB for name, size in sizes.items()})
        label = f"measured ({found.memory_source})" if not place else None
        axes.plot([measured / _MIB] * 2, [place - 0.42, place + 0.42], "k:", label=label)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("memory (MiB)")
    _legend(axes)
    return axes


def plot_time(axes: Axes, found: StepProfile) -> Axes:
    """One bar of a training step, stacked by phase.

    Parameters
    ----------
    axes : Axes
        Drawn on.
    found : StepProfile
    """
    _stack(axes, 0, {phase: seconds * 1000 for phase, seconds in found.phase_seconds.items()})
    axes.set_yticks([0], ["training step"])
    axes.set_xlabel(f"time (ms), medians over {found.num_steps} steps")
    _legend(axes)
    return axes


def _stack(axes: Axes, place: int, sizes: Mapping[str, float]) -> None:
    left = 0.0
    for name, size in sizes.items():
        known = axes.get_legend_handles_labels()[1]
        label = None if name in known else name
        axes.barh(place, size, left=left, height=0.6, color=_COLORS[name], label=label)
        left += size


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def write_profile(
    found: StepProfile, rows: Sequence[Mapping[str, Any]], folder: Path, title: str
) -> list[Path]:
    """Write `profile.svg`, `profile.png` and `profile.csv`.

    Parameters
    ----------
    found : StepProfile
        What to draw.
    rows : sequence of mapping
        What the CSV holds.
    folder : Path
        Made if it is not there.
    title : str
        Of the picture.

    Raises
    ------
    DataError
        The folder cannot be written to.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    memory, time = figure.subplots(2, 1, height_ratios=[2, 1])
    plot_memory(memory, found).set_title(title, fontsize=10)
    plot_time(time, found)
    paths = [folder / f"profile.{suffix}" for suffix in ("svg", "png", "csv")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.hashsalt": "profile"}):
            figure.savefig(paths[0], metadata={"Date": None})
            figure.savefig(paths[1], dpi=150)
        with paths[2].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error}; choose another folder") from None
    return paths
