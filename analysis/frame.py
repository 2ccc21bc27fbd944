"""The run frame: which runs an analysis rests on, and what was left out on the way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pandas as pd

from db.errors import AnalysisError
from db.measures import MEASURES
from db.spec import RunSpec, RunStatus

FullCatalog = Literal["paper", "vocabulary", "drop"]
"""How a run over the whole catalog enters a relation with `num_negatives`: `paper` leaves it out
of the pairs that involve num_negatives, `vocabulary` sets num_negatives to the catalog size,
`drop` leaves the run out of every pair."""
Selection = Literal["published", "all"]
"""`published` leaves out of the paper's runs what its own figures leave out; `all` takes all."""
Repeats = Literal["as_published", "without"]
"""Whether repeated runs of one point and seed count as often as they occur, or once."""

FACTORS: tuple[str, ...] = ("num_negatives", "batch_size", "max_seq_len")
"""The three parameters of the trade-off, in the paper's order."""
PRODUCTS: dict[str, tuple[str, str]] = {
    "num_negatives*batch_size": ("num_negatives", "batch_size"),
    "num_negatives*max_seq_len": ("num_negatives", "max_seq_len"),
    "max_seq_len*batch_size": ("max_seq_len", "batch_size"),
}
"""Name of each pairwise product and its factors."""
PARAMETERS: tuple[str, ...] = (*FACTORS, *PRODUCTS)
"""The parameters and products that associations and importances are about, in order."""
QUALITY: tuple[str, ...] = ("ndcg_at_10", "coverage_at_10", "surprisal_at_10")
"""The three qualities of the paper's Fig. 7."""
MEMORY = "peak_train_memory_bytes"
TIME = "epoch_seconds"
SOFTMAX_LOSSES = ("ce", "ce_minus", "cce", "cce_minus")
"""Losses with one objective, so that runs of all four tell about the same parameters."""
PAPER_SOURCE = "paper"
"""First part of the `source` of imported runs of the paper."""
SHORT_NAMES: dict[str, str] = {
    "num_negatives": "ns",
    "batch_size": "bs",
    "max_seq_len": "sl",
    "num_negatives*batch_size": "ns·bs",
    "num_negatives*max_seq_len": "ns·sl",
    "max_seq_len*batch_size": "sl·bs",
}
"""Names of the parameters on axes."""

TRAINING_FIELDS: tuple[str, ...] = (
    "embedding_dim", "num_blocks", "num_heads", "dropout_rate", "mask_probability",
    "learning_rate", "optimizer", "precision", "max_epochs", "patience", "evaluate_every_steps",
    "mask_seen", "metric_frame",
)  # fmt: skip
"""How a run is trained and measured, whatever its loss and sizes."""

_SPEC_FIELDS = tuple(field.name for field in fields(RunSpec))
_FREE_FIELDS = {"dataset", "loss", "seed", *FACTORS}
_REQUIRED = ("run_key", "dataset", "loss", "batch_size", "max_seq_len", "num_negatives", "status")
_OPTIONAL_DEFAULTS: dict[str, str | int] = {
    "replicate": 0,
    "seed": 42,
    "model": "sasrec",
    "source": "own",
    "device_class": "unknown",
    "memory_source": "unknown",
    "time_source": "unknown",
    "timing": "exclusive",
}
_BYTES_FLOOR = 1e6
"""No training run fits into a megabyte: smaller figures are in another unit."""


@dataclass(frozen=True)
class Runs:
    """Runs to analyse, and in words what was left out.

    Attributes
    ----------
    frame : DataFrame
        Finished runs in the order of the database, numbers finite or missing.
    infeasible : DataFrame
        Runs that ran out of memory or were skipped because a smaller one did.
    notes : tuple of str
        One sentence for everything that was left out, relabelled or looks odd.
    """

    frame: pd.DataFrame
    infeasible: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets, in order of first appearance."""
        return list(dict.fromkeys(self.frame["dataset"]))


def load_runs(
    url: str, sweeps: Sequence[str] | None = None, datasets: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read one row per run from the run database.

    Raises
    ------
    AnalysisError
        The database holds no run of these sweeps and datasets.
    """
    from db import query

    frame = query.summary_frame(url, sweeps=sweeps, datasets=datasets)
    if frame.empty:
        chosen = [f"sweep {name!r}" for name in sweeps or ()]
        chosen += [f"dataset {name!r}" for name in datasets or ()]
        raise AnalysisError(
            f"no runs{' of ' + ', '.join(chosen) if chosen else ''} in this database; "
            "'srsweep launch' makes some, 'srsweep import' brings some, 'srsweep runs' lists them"
        )
    return frame


def select(
    frame: pd.DataFrame,
    *,
    selection: Selection = "published",
    repeats: Repeats = "as_published",
) -> Runs:
    """Check a run frame and keep the finished runs.

    Parameters
    ----------
    frame : DataFrame
        Shaped as `db.query.summary_frame`; only the RunSpec fields that vary need be there.
    selection, repeats
        See `Selection` and `Repeats`.

    Raises
    ------
    AnalysisError
        A column is missing, a number is text, or memory figures mix units.
    """
    checked, notes = _checked(frame)
    checked = _labelled_sources(checked, notes)
    if selection == "published":
        checked = _published_selection(checked, notes)
    if repeats == "without":
        checked = _without_repeats(checked, notes)
    infeasible = checked["status"].isin([RunStatus.OUT_OF_MEMORY, RunStatus.SKIPPED])
    done = checked["status"].eq(RunStatus.DONE)
    for status, count in checked.loc[~done & ~infeasible, "status"].value_counts().items():
        notes.append(f"{count} runs with status {status} take no part.")
    return Runs(
        checked[done].reset_index(drop=True),
        checked[infeasible].reset_index(drop=True),
        tuple(notes),
    )


def comparable(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Per dataset the runs that differ in batch size, length, negatives and seed only.

    Of every other setting the most frequent combination is kept, so that an association with
    one of the three is not one with something else that moved along. A setting that a grid ties
    to one of the three (one value of it for each value of the parameter) stays, and a note says
    that the two cannot be told apart. The four softmax losses have one objective and count as
    one; without them the most frequent loss is taken.

    Returns
    -------
    frame : DataFrame
    notes : tuple of str
        What was left out and what follows what, per dataset.
    """
    kept: list[pd.DataFrame] = []
    notes: list[str] = []
    settings = [name for name in _SPEC_FIELDS if name in frame and name not in _FREE_FIELDS]
    for dataset, group in frame.groupby("dataset", sort=False):
        softmax = group["loss"].isin(SOFTMAX_LOSSES)
        rows = group[softmax] if softmax.any() else group[group["loss"] == group["loss"].mode()[0]]
        loss_settings = {"paper_negatives", "count_padding"} if softmax.any() else set()
        names = [name for name in settings if name not in loss_settings]
        names = [name for name in names if rows[name].nunique(dropna=False) > 1]
        for name, factor in _tied(rows, names).items():
            names.remove(name)
            notes.append(
                f"{dataset}: {name} is set by {factor} in these runs; what is said of {factor} "
                "is said of both."
            )
        if names:
            combination = rows[names].astype("string").fillna("null").agg("|".join, axis=1)
            rows = rows[combination == combination.mode()[0]]
        if len(rows) < len(group):
            notes.append(
                f"{dataset}: {len(group) - len(rows)} of {len(group)} runs differ in another "
                "setting or loss and take no part in associations and importances."
            )
        kept.append(rows)
    return (pd.concat(kept) if kept else frame), tuple(notes)


def _tied(rows: pd.DataFrame, names: Iterable[str]) -> dict[str, str]:
    """Settings with one value for each value of a factor, and the factor."""
    tied = {}
    for factor in FACTORS:
        levels = rows.groupby(factor, dropna=False)
        if not 1 < levels.ngroups < len(rows):
            continue
        for name in names:
            if name not in tied and levels[name].nunique(dropna=False).max() == 1:
                tied[name] = factor
    return tied


def same_memory(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Runs whose memory and time may be compared: per dataset one device class and source.

    Returns
    -------
    frame : DataFrame
        Per dataset the rows of its most frequent device class, memory and time source.
    notes : tuple of str
    """
    kept, notes = [], []
    keys = ["device_class", "memory_source", "time_source"]
    for dataset, group in frame.groupby("dataset", sort=False):
        combination = group[keys].astype("string").fillna("unknown").agg(", ".join, axis=1)
        most = combination.mode()[0]
        rows = group[combination == most]
        if len(rows) < len(group):
            notes.append(
                f"{dataset}: memory and time are compared on {most} only; "
                f"{len(group) - len(rows)} of {len(group)} runs were measured elsewhere."
            )
        kept.append(rows)
    return (pd.concat(kept) if kept else frame), tuple(notes)


def parameter_frame(
    frame: pd.DataFrame, full_catalog: FullCatalog = "paper", parameters: Iterable[str] = PARAMETERS
) -> pd.DataFrame:
    """Parameters and their products, one float column each; missing for a full catalog.

    Parameters
    ----------
    frame : DataFrame
        Columns of the three factors; `num_items` with `full_catalog="vocabulary"`.
    full_catalog : {"paper", "vocabulary", "drop"}
        See `FullCatalog`. With `drop` every column of a full-catalog run is missing.
    parameters : iterable of str
        Names, a product written `a*b`.

    Raises
    ------
    AnalysisError
        A parameter is unknown, or the catalog size is needed and missing.
    """
    base = frame.reindex(columns=list(dict.fromkeys([*FACTORS, *_factors_of(parameters)])))
    base = base.apply(pd.to_numeric).astype(float)
    full = base["num_negatives"].isna()
    if full_catalog == "vocabulary" and full.any():
        if "num_items" not in frame or frame.loc[full, "num_items"].isna().any():
            raise AnalysisError(
                "full_catalog='vocabulary' needs num_items of every dataset and some is missing; "
                "use 'paper' or 'drop'"
            )
        base.loc[full, "num_negatives"] = frame.loc[full, "num_items"].astype(float)
    if full_catalog == "drop":
        base.loc[full] = np.nan
    out = {}
    for name in parameters:
        factors = name.split("*")
        missing = [factor for factor in factors if factor not in frame]
        if missing:
            raise AnalysisError(
                f"parameter {name!r}: no column {missing[0]!r} in these runs; "
                f"known are {', '.join(PARAMETERS)} and the numeric fields of a run"
            )
        out[name] = base[factors].prod(axis=1, skipna=False)
    return pd.DataFrame(out, index=frame.index)


def point_labels(frame: pd.DataFrame) -> pd.Series:
    """Integer label of the point of each run: equal settings but for seed and repeat share it."""
    names = [name for name in _SPEC_FIELDS if name in frame and name != "seed"]
    return frame.groupby(names, dropna=False, sort=False).ngroup()


def trainings(frame: pd.DataFrame) -> pd.Series:
    """Number of each run's training fields: runs of one number differ in loss and sizes alone."""
    names = [name for name in TRAINING_FIELDS if name in frame]
    if not names:
        return pd.Series(0, index=frame.index)
    return frame.groupby(names, dropna=False, sort=False).ngroup()


def numeric(frame: pd.DataFrame, column: str) -> pd.Series:
    """One column as finite floats, missing elsewhere; missing throughout if it is not there."""
    if column not in frame:
        return pd.Series(np.nan, index=frame.index, dtype=float)
    values = pd.to_numeric(frame[column], errors="coerce").astype(float)
    return values.where(np.isfinite(values))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries by column name."""
    names = [str(name) for name in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.itertuples(index=False, name=None)]


def _factors_of(parameters: Iterable[str]) -> list[str]:
    return [factor for name in parameters for factor in name.split("*")]


def _checked(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """A copy with every needed column, numbers as numbers, infinities as missing."""
    missing = [name for name in _REQUIRED if name not in frame]
    if missing:
        raise AnalysisError(
            f"the run frame lacks {', '.join(missing)}; it needs {', '.join(_REQUIRED)} and the "
            "measures to analyse"
        )
    notes: list[str] = []
    columns = {str(name): frame[name] for name in frame}
    for name, default in _OPTIONAL_DEFAULTS.items():
        if name not in columns:
            columns[name] = pd.Series(default, index=frame.index)
    for name in columns:
        if name in MEASURES or name in FACTORS:
            columns[name] = _as_numbers(frame, name, notes)
    out = pd.DataFrame(columns, index=frame.index)
    _check_units(out)
    return out, notes


def _as_numbers(frame: pd.DataFrame, name: str, notes: list[str]) -> pd.Series:
    values = pd.to_numeric(frame[name], errors="coerce")
    bad = values.isna() & frame[name].notna()
    if bad.any():
        row = frame.loc[bad].iloc[0]
        raise AnalysisError(
            f"{name}={row[name]!r} of run {str(row['run_key'])[:12]} is not a number; "
            f"{int(bad.sum())} such values, correct them in the file and import it again"
        )
    infinite = np.isinf(values.astype(float))
    if infinite.any():
        notes.append(f"{int(infinite.sum())} infinite values of {name} count as missing.")
    return values.astype(float).mask(infinite)


def _check_units(frame: pd.DataFrame) -> None:
    for name in ("peak_train_memory_bytes", "peak_eval_memory_bytes"):
        values = numeric(frame, name).dropna()
        small = values[(values > 0) & (values < _BYTES_FLOOR)]
        if len(small) and len(small) < len(values):
            raise AnalysisError(
                f"{name} mixes units: {len(small)} of {len(values)} values are below a megabyte "
                f"(the first is {small.iloc[0]:g}); import each file with its own unit"
            )
        if len(small):
            raise AnalysisError(
                f"{name}={small.iloc[0]:g} is less than a megabyte for a whole training run; the "
                "figures look like GiB or MiB, import them with that unit"
            )


def _labelled_sources(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Tell apart equal dataset names from several sources."""
    sources = frame.groupby("dataset")["source"].nunique()
    for dataset in sources[sources > 1].index:
        rows = frame["dataset"] == dataset
        frame.loc[rows, "dataset"] = f"{dataset} [" + frame.loc[rows, "source"].astype(str) + "]"
        notes.append(f"{dataset} comes from {sources[dataset]} sources, which are kept apart.")
    return frame


def _published_selection(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Leave out what the paper's notebook leaves out: sample counts that begin with 15."""
    negatives = numeric(frame, "num_negatives").fillna(0).astype(int).astype(str)
    paper = frame["source"].astype(str).str.split("/").str[0].eq(PAPER_SOURCE)
    hidden = paper & negatives.str.startswith("15")
    if hidden.any():
        notes.append(
            f"{int(hidden.sum())} published runs with {_values(frame, hidden)} negatives are left "
            "out, as in the paper's figures (selection 'published'; 'all' takes them)."
        )
    return frame[~hidden]


def _values(frame: pd.DataFrame, rows: pd.Series) -> str:
    return " or ".join(
        f"{value:,.0f}" for value in sorted(frame.loc[rows, "num_negatives"].unique())
    )


def _without_repeats(frame: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    repeated = frame["replicate"].astype(int) > 0
    if repeated.any():
        notes.append(f"{int(repeated.sum())} repeats of a point and seed are left out.")
    return frame[~repeated]
