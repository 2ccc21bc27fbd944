"""Pictures of a prepared dataset; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from db.errors import DataError
from trainer.data.describe import TOP_ITEMS, Description, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOR = "#31688e"
SECOND_COLOR = "#d95f02"


def plot_lengths(axes: Axes, rows: list[Row]) -> Axes:
    """Histogram of training sequence lengths.

    Parameters
    ----------
    axes : Axes
        Drawn on.
    rows : list of dict
        `Description.lengths`.
    """
    edges = [row["length_from"] for row in rows] + [rows[-1]["length_to"]]
    axes.stairs([row["users"] for row in rows], edges, fill=True, color=COLOR)
    axes.set(xscale="log", xlabel="training sequence length (items)", ylabel="users")
    return axes


def plot_coverage(axes: Axes, rows: list[Row]) -> Axes:
    """Share of the training rows and of the users that each `max_seq_len` reaches.

    Parameters
    ----------
    axes : Axes
        Drawn on.
    rows : list of dict
        `Description.coverage`.
    """
    lengths = [row["max_seq_len"] for row in rows]
    axes.plot(lengths, [row["row_share"] for row in rows], "o-", color=COLOR, label="rows kept")
    axes.plot(
        lengths,
        [row["truncated_user_share"] for row in rows],
        "s--",
        color=SECOND_COLOR,
        label="users truncated",
    )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="max_seq_len (items)", ylabel="share", ylim=(-0.02, 1.02))
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.legend(loc="center right")
    return axes


def plot_popularity(axes: Axes, rows: list[Row]) -> Axes:
    """Training rows of the items by rank, and the share that the top ones hold together.

    Parameters
    ----------
    axes : Axes
        Drawn on; a second axis on the right is added.
    rows : list of dict
        `Description.popularity`.
    """
    ranks = [row["rank"] for row in rows]
    axes.plot(ranks, [row["rows"] for row in rows], color=COLOR)
    axes.set(xscale="log", yscale="log", xlabel="item rank by popularity", ylabel="training rows")
    right = axes.twinx()
    shares = [row["cumulated_row_share"] for row in rows]
    right.plot(ranks, shares, color=SECOND_COLOR, linestyle="--")
    right.set_ylabel("cumulated share of rows", color=SECOND_COLOR)
    right.set_ylim(0, 1.02)
    return axes


def plot_drift(axes: Axes, rows: list[Row]) -> Axes:
    """How the most popular items change from period to period, and how much is new.

    Parameters
    ----------
    axes : Axes
        Drawn on.
    rows : list of dict
        `Description.drift`.
    """
    series = (
        ("top_overlap_previous", f"top {TOP_ITEMS} shared with the period before", "o-", COLOR),
        ("top_overlap_first", f"top {TOP_ITEMS} shared with the first period", "o:", COLOR),
        ("new_item_row_share", "rows on items not seen before", "s--", SECOND_COLOR),
    )
    for name, label, style, color in series:
        points = [(row["period"], row[name]) for row in rows if row[name] is not None]
        axes.plot(*zip(*points, strict=True), style, color=color, label=label)
    axes.set(xlabel="period begins", ylabel="share", ylim=(-0.02, 1.02))
    labels = [row["begins"] for row in rows]
    axes.set_xticks([row["period"] for row in rows], labels, rotation=45, ha="right", fontsize=8)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize=8, ncols=2)
    return axes


FIGURES: dict[str, Callable[[Axes, list[Row]], Axes]] = {
    "lengths": plot_lengths,
    "coverage": plot_coverage,
    "popularity": plot_popularity,
    "drift": plot_drift,
}
"""Name of a figure, also the curve of `Description` that it draws -> its function."""


def write_figures(description: Description, folder: Path) -> list[Path]:
    """Write each figure as SVG and PNG with the CSV that it drew, and the summary as CSV.

    Parameters
    ----------
    description : Description
        What to draw.
    folder : Path
        Made if it is not there.

    Returns
    -------
    list of Path
        Files written.

    Raises
    ------
    DataError
        The folder cannot be written to.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    tables = {name: getattr(description, name) for name in ("summary", *FIGURES)}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            if not rows:
                continue
            written.append(_write_csv(folder / f"{name}.csv", rows))
            if name not in FIGURES:
                continue
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            FIGURES[name](figure.add_subplot(), rows).set_title(description.name)
            for suffix in ("svg", "png"):
                path = folder / f"{name}.{suffix}"
                # Without a date and with a fixed salt the same data give the same file.
                metadata = {"Date": None} if suffix == "svg" else None
                with rc_context({"svg.hashsalt": name}):
                    figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error}; choose another --out") from None
    return written


def _write_csv(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
