"""Claims 1 to 10: what batch size, sequence length, negatives and memory do to quality."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.association import associations, point_weights
from analysis.evidence import (
    Estimate,
    Finding,
    Verdict,
    above,
    cells,
    combined,
    judge,
    keys_of,
    matched,
    mean_estimate,
    percent,
    undecidable,
)
from analysis.frame import FACTORS, MEMORY, numeric, point_labels, records
from analysis.importance import Importance, Importances, ModelScore
from analysis.saturation import TOLERANCE, saturations

Floats = npt.NDArray[np.float64]
NDCG = "ndcg_at_10"
GROWING = {"zvuk", "movielens_20m", "30music", "megamarket"}
SATURATING = {"beauty", "gowalla"}
MODERATE = (64, 512)
"""Numbers of negatives that the paper calls moderate."""
BUDGETS = 8
"""Memory budgets at which the headline is tested, evenly spaced in the logarithm."""


def memory_and_quality(frame: pd.DataFrame) -> list[Finding]:
    """Claim 1: rank correlation of memory and NDCG@10 is above zero."""
    found = associations(
        frame.assign(**{MEMORY: numeric(frame, MEMORY)}),
        metrics=[NDCG], parameters=[MEMORY], resamples=4_000,
    )  # fmt: skip
    out = []
    for row in found.rows:
        keys = frame.loc[frame["dataset"] == row.dataset, "run_key"]
        if row.coefficient is None:
            out.append(undecidable(1, row.dataset, row.note))
            continue
        estimate = Estimate(
            row.coefficient, _or_nan(row.low), _or_nan(row.high), row.n, tuple(keys)
        )
        out.append(above(1, row.dataset, estimate, 0.0, "Spearman's rho of memory and NDCG@10"))
    return out


def most_influential(found: Importances, frame: pd.DataFrame) -> list[Finding]:
    """Claim 2: shuffling bs or ns (with their products) costs more than shuffling sl."""
    out = []
    for dataset, rows in _by_dataset(found, "permutation_grouped", frame):
        by_name = {row.parameter: row for row in rows}
        if not rows[0].predicts:
            out.append(_no_model(2, dataset, rows[0]))
            continue
        weaker = min(
            (by_name["batch_size"], by_name["num_negatives"]), key=lambda row: row.importance
        )
        length = by_name["max_seq_len"]
        estimate = Estimate(
            weaker.importance - length.importance,
            _or_nan(weaker.low) - _or_nan(length.high),
            _or_nan(weaker.high) - _or_nan(length.low),
            0, _keys(frame, dataset),
        )  # fmt: skip
        reason = (
            f"loss of out-of-sample R²: bs {by_name['batch_size'].importance:.2f}, ns "
            f"{by_name['num_negatives'].importance:.2f}, sl {length.importance:.2f}"
        )
        out.append(combined(2, dataset, estimate, [judge(estimate, 0.0)], reason))
    return out


def products(found: Importances, frame: pd.DataFrame) -> list[Finding]:
    """Claim 3: ns·bs and sl·bs each have more than one sixth of the impurity importance."""
    out = []
    for dataset, rows in _by_dataset(found, "impurity", frame):
        by_name = {row.parameter: row for row in rows}
        if not rows[0].predicts:
            out.append(_no_model(3, dataset, rows[0]))
            continue
        pair = (by_name["num_negatives*batch_size"], by_name["max_seq_len*batch_size"])
        weaker = min(pair, key=lambda row: row.importance)
        estimate = Estimate(
            weaker.importance, _or_nan(weaker.low), _or_nan(weaker.high), 0, _keys(frame, dataset)
        )
        reason = (
            f"the weaker of ns·bs {pair[0].importance:.2f} and sl·bs {pair[1].importance:.2f} "
            "against an even share of 0.17; collinear features split it arbitrarily"
        )
        out.append(combined(3, dataset, estimate, [judge(estimate, 1 / 6)], reason))
    return out


def fit(found: Importances, frame: pd.DataFrame) -> list[Finding]:
    """Claim 4: the forest predicts unseen points with R^2 above 0.95, for every quality."""
    out = []
    for dataset in dict.fromkeys(frame["dataset"]):
        scores = [score for score in found.scores if score.dataset == dataset]
        if not scores:
            out.append(undecidable(4, dataset, _first_note(found, dataset)))
            continue
        unseen = [score for score in scores if score.scheme == "kfold_by_point"]
        worst = min(unseen, key=lambda score: score.r2)
        estimate = Estimate(
            worst.r2, _or_nan(worst.low), _or_nan(worst.high), 0, _keys(frame, dataset)
        )
        reason = f"out of sample {_scores(unseen)}; in sample " + _scores(
            [score for score in scores if score.scheme == "in_sample"]
        )
        out.append(combined(4, dataset, estimate, [judge(estimate, 0.95)], reason))
    return out


def growth(frame: pd.DataFrame) -> list[Finding]:
    """Claim 5: the last doubling of memory still gains one percent, or no longer does."""
    out = []
    known = {item.dataset: item for item in saturations(frame)}
    for dataset in dict.fromkeys(frame["dataset"]):
        if dataset not in known:
            out.append(undecidable(5, dataset, "fewer than 8 points with memory and NDCG@10"))
            continue
        item = known[dataset]
        estimate = Estimate(item.gain, item.gain_low, item.gain_high, item.n, _keys(frame, dataset))
        grows = judge(estimate, TOLERANCE)
        saturates = base_name(dataset) in SATURATING
        opposite: dict[Verdict, Verdict] = {
            "supported": "contradicted", "contradicted": "supported", "undecidable": "undecidable",
        }  # fmt: skip
        reason = (
            f"claimed to {'saturate' if saturates else 'keep growing'}; the last doubling of "
            f"memory gains {percent(item.gain)}, within 1 % of the best from "
            f"{item.point / 2**30:.3g} GiB on ({item.point_low / 2**30:.3g} to "
            f"{item.point_high / 2**30:.3g}) of {item.largest_cost / 2**30:.3g}"
        )
        verdict = opposite[grows] if saturates else grows
        out.append(combined(5, dataset, estimate, [verdict], reason))
    return out


def negatives(frame: pd.DataFrame) -> list[Finding]:
    """Claim 6: 64 to 512 negatives beat fewer and more; the full softmax wins only on Zvuk."""
    out = []
    for dataset, group in frame.groupby("dataset", sort=False):
        table = cells(group, [*FACTORS], [NDCG])
        best, top = _best_by_band(table), table[NDCG].max()
        sides = {}
        for side in ("few", "many"):
            pairs = best.dropna(subset=["moderate", side])
            gain = (pairs["moderate"] - pairs[side]) / top
            sides[side] = mean_estimate(gain, keys_of(pairs))
        full = best.dropna(subset=["full"])
        sampled = full[["few", "moderate", "many"]].max(axis=1)
        win = mean_estimate((full["full"] - sampled) / top, keys_of(full))
        parts = [judge(estimate, 0.0) for estimate in sides.values()]
        wins = judge(win, 0.0)
        expected = base_name(str(dataset)) == "zvuk"
        parts.append(wins if expected else _not(wins))
        weaker = min(sides.values(), key=lambda item: np.nan_to_num(item.value, nan=np.inf))
        reason = (
            f"best of 64-512 against fewer {percent(sides['few'].value)}, against more "
            f"{percent(sides['many'].value)}; full softmax against the best sampled "
            + (f"{percent(win.value)} on {win.count} matched settings" if win.count else
               "not decidable: no matched runs")
        )  # fmt: skip
        out.append(combined(6, str(dataset), weaker, parts, reason))
    return out


def batch_size(frame: pd.DataFrame) -> list[Finding]:
    """Claim 7: four times the batch is better, except where the paper says otherwise."""
    out = []
    for dataset, group in frame.groupby("dataset", sort=False):
        name = base_name(str(dataset))
        small, large = _batch_pair(group, name)
        if small is None:
            out.append(undecidable(7, str(dataset), "one batch size only"))
            continue
        pairs = matched(
            group[group["batch_size"] == small], group[group["batch_size"] == large],
            ["max_seq_len", "num_negatives"], [NDCG],
        )  # fmt: skip
        gain = pairs[f"{NDCG}_right"] - pairs[f"{NDCG}_left"]
        estimate = mean_estimate(gain / numeric(group, NDCG).max(), keys_of(pairs))
        better = judge(estimate, 0.0)
        expectation, verdict = "is better", better
        if name == "movielens_20m":
            expectation, verdict = "is worse", _not(better)
        elif name in {"zvuk", "30music"}:
            expectation = "gains less than 5 %"
            verdict = _not(judge(estimate, 0.05))
        reason = (
            f"bs {large:g} against {small:g} at equal sl and ns, claimed that the larger "
            f"{expectation}; {estimate.count} comparisons"
        )
        out.append(combined(7, str(dataset), estimate, [verdict], reason))
    return out


def sequence_length(frame: pd.DataFrame) -> list[Finding]:
    """Claim 8: at a batch size of 256 or more the longest sequences beat the shortest."""
    out = []
    for dataset, group in frame.groupby("dataset", sort=False):
        table = cells(group[group["batch_size"] >= 256], [*FACTORS], [NDCG])
        top = numeric(group, NDCG).max()
        gains, keys = [], []
        for _, cell in table.groupby(["batch_size", "num_negatives"], dropna=False):
            if cell["max_seq_len"].nunique() < 2:
                continue
            ordered = cell.sort_values("max_seq_len")
            gains.append((ordered[NDCG].iloc[-1] - ordered[NDCG].iloc[0]) / top)
            keys += [*ordered["run_keys"].iloc[0], *ordered["run_keys"].iloc[-1]]
        if not gains:
            reason = "no two sequence lengths at a batch size of 256 or more"
            out.append(undecidable(8, str(dataset), reason))
            continue
        what = "longest less shortest sequences at equal bs >= 256 and ns"
        out.append(above(8, str(dataset), mean_estimate(gains, keys), 0.0, what))
    return out


def two_together(frame: pd.DataFrame) -> list[Finding]:
    """Claim 9: doubling two factors beats multiplying one of them by four.

    It is supported where two together beat even the better of the two single moves, and
    contradicted where they lose even to their mean, the expectation of who knows neither.
    """
    out = []
    for dataset, group in frame.groupby("dataset", sort=False):
        table = cells(group.dropna(subset=["num_negatives"]), [*FACTORS], [NDCG])
        points = {
            tuple(row[name] for name in FACTORS): (row[NDCG], row["run_keys"])
            for row in records(table)
        }
        over_mean, over_better, keys = [], [], []
        for point in points:
            for first, second in combinations(range(len(FACTORS)), 2):
                pair = _scaled(point, {first: 2, second: 2})
                singles = [_scaled(point, {first: 4}), _scaled(point, {second: 4})]
                if all(other in points for other in (pair, *singles)):
                    alone = [points[single][0] for single in singles]
                    over_mean.append(points[pair][0] - np.mean(alone))
                    over_better.append(points[pair][0] - max(alone))
                    keys += [key for at in (pair, *singles) for key in points[at][1]]
        if not keys:
            reason = "no point from which two factors doubled and one times four were both run"
            out.append(undecidable(9, str(dataset), reason))
            continue
        top = table[NDCG].max()
        mean = mean_estimate(np.array(over_mean) / top, keys)
        better = mean_estimate(np.array(over_better) / top, keys)
        verdict: Verdict = "undecidable"
        if judge(better, 0.0) == "supported":
            verdict = "supported"
        elif judge(mean, 0.0) == "contradicted":
            verdict = "contradicted"
        reason = (
            f"against the mean of the two single moves {percent(mean.value)}, against the better "
            f"{percent(better.value)} of the best NDCG@10; {mean.count} comparisons"
        )
        out.append(combined(9, str(dataset), mean, [verdict], reason))
    return out


def headline(frame: pd.DataFrame, resamples: int = 2_000) -> list[Finding]:
    """Claim 10: within a memory budget, the most negatives (or all) lose over one percent."""
    out = []
    for dataset, group in frame.groupby("dataset", sort=False):
        regrets = budget_regrets(group)
        if len(regrets) < 2 or numeric(group, "num_negatives").nunique() < 2:
            reason = "too few runs with memory, NDCG@10 and different numbers of negatives"
            out.append(undecidable(10, str(dataset), reason))
            continue
        labels = point_labels(group).to_numpy()
        weights = point_weights(labels, resamples, 0)
        arrays = _budget_arrays(group)
        drawn = np.array([_mean_regret(arrays, row > 0) for row in weights])
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        value = float(regrets["regret"].mean())
        estimate = Estimate(value, low, high, len(regrets), _keys(frame, str(dataset)))
        worst = regrets.iloc[int(regrets["regret"].to_numpy(float).argmax())]
        reason = (
            f"mean regret over {len(regrets)} budgets; largest {percent(worst['regret'])} at "
            f"{worst['budget'] / 2**30:.3g} GiB"
        )
        out.append(combined(10, str(dataset), estimate, [judge(estimate, TOLERANCE)], reason))
    return out


def budget_regrets(group: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10 lost by taking the most negatives that fit, for a range of budgets.

    Parameters
    ----------
    group : DataFrame
        Runs of one dataset.

    Returns
    -------
    DataFrame
        Columns budget, best, most_negatives, regret (share of the best that is lost).
    """
    costs, quality, negatives_, budgets = _budget_arrays(group)
    rows = []
    for budget in budgets:
        within = costs <= budget
        if not within.any():
            continue
        best = quality[within].max()
        most = quality[within & (negatives_ == negatives_[within].max())].max()
        rows.append((budget, best, most, 1 - most / best if best > 0 else np.nan))
    return pd.DataFrame(rows, columns=["budget", "best", "most_negatives", "regret"])


_Arrays = tuple[Floats, Floats, Floats, Floats]


def _budget_arrays(group: pd.DataFrame) -> _Arrays:
    costs = numeric(group, MEMORY).to_numpy(float)
    quality = numeric(group, NDCG).to_numpy(float)
    taken = numeric(group, "num_negatives").fillna(np.inf).to_numpy(float)
    usable = np.isfinite(costs) & np.isfinite(quality)
    costs = np.where(usable, costs, np.inf)
    finite = costs[usable]
    if len(finite) < 2 or finite.min() == finite.max():
        return costs, quality, taken, finite[:0]
    budgets = np.geomspace(np.quantile(finite, 0.1), finite.max(), BUDGETS)
    budgets[-1] = finite.max()
    return costs, quality, taken, budgets


def _mean_regret(arrays: _Arrays, drawn: npt.NDArray[np.bool_]) -> float:
    costs, quality, taken, budgets = arrays
    regrets = []
    for budget in budgets:
        within = drawn & (costs <= budget)
        if within.any():
            best = quality[within].max()
            most = quality[within & (taken == taken[within].max())].max()
            regrets.append(1 - most / best if best > 0 else np.nan)
    return float(np.nanmean(regrets)) if regrets else np.nan


def base_name(dataset: str) -> str:
    """Name of a dataset without the source that tells it from others of the name."""
    return dataset.split(" [")[0]


def _best_by_band(table: pd.DataFrame) -> pd.DataFrame:
    """Best NDCG@10 of each band of negatives in every cell of batch size and length."""
    band = pd.cut(
        table["num_negatives"].astype(float),
        [0, MODERATE[0] - 1, MODERATE[1], np.inf], labels=["few", "moderate", "many"],
    )  # fmt: skip
    table = table.assign(band=band.astype(object).where(table["num_negatives"].notna(), "full"))
    keys = ["batch_size", "max_seq_len"]
    wide = table.pivot_table(index=keys, columns="band", values=NDCG, aggfunc="max")
    wide = wide.reindex(columns=["few", "moderate", "many", "full"])
    wide["run_keys"] = table.groupby(keys)["run_keys"].agg(_joined)
    return wide[(wide.drop(columns="run_keys").max(axis=1) > 0)].reset_index()


def _joined(run_keys: "pd.Series[Any]") -> tuple[str, ...]:
    return tuple(key for keys in run_keys for key in keys)


def _batch_pair(group: pd.DataFrame, name: str) -> tuple[float | None, float | None]:
    """Batch sizes to compare: the paper's 128 and 512, or the largest and a quarter of it."""
    sizes = sorted(set(group["batch_size"]))
    if len(sizes) < 2:
        return None, None
    if name == "30music" and {512, 1024} <= set(sizes):
        return 512, 1024
    if {128, 512} <= set(sizes):
        return 128, 512
    return min(sizes[:-1], key=lambda size: abs(size - sizes[-1] / 4)), sizes[-1]


def _scaled(point: Sequence[float], by: dict[int, int]) -> tuple[float, ...]:
    return tuple(value * by.get(place, 1) for place, value in enumerate(point))


def _by_dataset(
    found: Importances, method: str, frame: pd.DataFrame
) -> list[tuple[str, list[Importance]]]:
    rows = [row for row in found.rows if row.method == method and row.metric == NDCG]
    names = [name for name in dict.fromkeys(frame["dataset"])]
    out = [(name, [row for row in rows if row.dataset == name]) for name in names]
    return [(name, group) for name, group in out if group]


def _no_model(claim: int, dataset: str, row: Importance) -> Finding:
    score = row.score_out_of_sample
    return undecidable(claim, dataset, f"the model does not predict (R² {score:.2f} out of sample)")


def _first_note(found: Importances, dataset: str) -> str:
    return next(
        (note for note in found.notes if note.startswith(f"{dataset}:")), "no model could be fitted"
    )


def _scores(scores: Sequence[ModelScore]) -> str:
    return ", ".join(f"{score.metric.split('_')[0]} {score.r2:.2f}" for score in scores)


def _keys(frame: pd.DataFrame, dataset: str) -> tuple[str, ...]:
    return tuple(frame.loc[frame["dataset"] == dataset, "run_key"])


def _not(verdict: Verdict) -> Verdict:
    swap: dict[Verdict, Verdict] = {"supported": "contradicted", "contradicted": "supported"}
    return swap.get(verdict, verdict)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
