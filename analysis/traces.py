"""What happened within runs: loss and quality per step, gradients of the final layer."""

import json

import numpy as np
import pandas as pd

from analysis.frame import numeric, records
from analysis.pareto import pareto_fronts

RUNS_PER_DATASET = 5
"""Runs that a figure of curves can hold apart."""
POINTS_PER_CURVE = 200
"""More points than this are averaged in bins: no column of a paper is wide enough to tell them."""
CURVE_COLUMNS: tuple[str, ...] = ("dataset", "run_key", "label", "step", "loss", "ndcg_at_10")
HISTOGRAM_COLUMNS: tuple[str, ...] = (
    "dataset", "run_key", "label", "name", "step", "edge_low", "edge_high", "count", "share",
)  # fmt: skip


def chosen_runs(frame: pd.DataFrame, most: int = RUNS_PER_DATASET) -> pd.DataFrame:
    """Runs whose curves are worth a look: of each dataset a few along its Pareto front.

    Parameters
    ----------
    frame : DataFrame
        Finished runs of one device class and memory source per dataset.
    most : int
        Of each dataset; evenly picked along the front, its ends included. A dataset without
        memory gives its best runs by NDCG@10.

    Returns
    -------
    DataFrame
        Rows of `frame`, by dataset and memory.
    """
    fronts = {front.dataset: front.runs for front in pareto_fronts(frame)}
    parts = []
    for dataset, group in frame.groupby("dataset", sort=False):
        runs = fronts.get(str(dataset))
        if runs is None:
            best = group.assign(ndcg_at_10=numeric(group, "ndcg_at_10"))
            runs = best.sort_values("ndcg_at_10", ascending=False, kind="stable").head(most)
        places = np.unique(np.linspace(0, len(runs) - 1, min(most, len(runs))).round().astype(int))
        parts.append(runs.iloc[places])
    return pd.concat(parts) if parts else frame.head(0)


def curves(url: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Training loss and validation NDCG@10 by step.

    Parameters
    ----------
    url : str
        Run database.
    runs : DataFrame
        Columns dataset, run_key and the settings that name a run.

    Returns
    -------
    DataFrame
        Columns `CURVE_COLUMNS`; at most `POINTS_PER_CURVE` rows a run, each the mean over a bin
        of steps. `ndcg_at_10` is the latest validation at or before the last step of the bin.
    """
    from db.query import steps_frame

    parts = []
    for row in records(runs):
        steps = steps_frame(url, str(row["run_key"]))
        if steps.empty:
            continue
        bins = np.arange(len(steps)) * min(POINTS_PER_CURVE, len(steps)) // len(steps)
        table = pd.DataFrame(
            {
                "step": steps["step"].groupby(bins).last(),
                "loss": numeric(steps, "loss").groupby(bins).mean(),
                "ndcg_at_10": numeric(steps, "ndcg_at_10").groupby(bins).last(),
            }
        )
        named = {name: row[name] for name in ("dataset", "run_key")}
        parts.append(table.assign(**named, label=run_label(row))[list(CURVE_COLUMNS)])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=CURVE_COLUMNS)


def gradient_histograms(url: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Distributions of the final layer's gradients, at the first and the last recorded step.

    Returns
    -------
    DataFrame
        Columns `HISTOGRAM_COLUMNS`; bins of absolute values [edge_low, edge_high) with their
        count and its share. At most `RUNS_PER_DATASET` runs a dataset, the best by NDCG@10.
    """
    from db.query import rows

    found = rows(
        url,
        "select run_key, name, step, edges, counts from histograms "
        "join attempts on attempts.id = attempt_id join runs on runs.id = attempts.run_id "
        "order by run_key, name, step",
    )
    by_run: dict[str, dict[str, list[tuple[int, str, str]]]] = {}
    for item in found:
        named = by_run.setdefault(item["run_key"], {}).setdefault(item["name"], [])
        named.append((item["step"], item["edges"], item["counts"]))
    probed = runs[runs["run_key"].isin(list(by_run))]
    probed = probed.assign(quality=numeric(probed, "ndcg_at_10")).sort_values(
        "quality", ascending=False, kind="stable"
    )
    parts = []
    for row in records(probed.groupby("dataset", sort=False).head(RUNS_PER_DATASET)):
        for name, recorded in by_run[row["run_key"]].items():
            for step, edges, counts in dict.fromkeys((recorded[0], recorded[-1])):
                bounds, sizes = np.array(json.loads(edges)), np.array(json.loads(counts))
                parts.append(
                    pd.DataFrame(
                        {
                            "dataset": row["dataset"],
                            "run_key": row["run_key"],
                            "label": run_label(row),
                            "name": name,
                            "step": step,
                            "edge_low": bounds[:-1],
                            "edge_high": bounds[1:],
                            "count": sizes,
                            "share": sizes / max(1, sizes.sum()),
                        }
                    )
                )
    if not parts:
        return pd.DataFrame(columns=HISTOGRAM_COLUMNS)
    return pd.concat(parts, ignore_index=True)


def run_label(row: dict[str, object]) -> str:
    """Short name of a run in a legend: its loss and the three parameters."""
    negatives = row["num_negatives"]
    full = negatives is None or pd.isna(float(str(negatives)))
    taken = "" if full else f" · ns {float(str(negatives)):g}"
    batch_size, length = (float(str(row[name])) for name in ("batch_size", "max_seq_len"))
    return f"{row['loss']} · bs {batch_size:g} · sl {length:g}{taken}"
