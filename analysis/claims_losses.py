"""Claims 11 to 19: what the losses, filtering and samplers do; they need runs of several losses."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.claims_scaling import NDCG, base_name
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
    relative,
    undecidable,
)
from analysis.frame import MEMORY, TIME, numeric, trainings

COVERAGE, SURPRISAL = "coverage_at_10", "surprisal_at_10"
_SETTING = ["model", "training", "batch_size", "max_seq_len"]
_POINT = [*_SETTING, "num_negatives"]
LARGE_CATALOG = 800_000
"""Items above which the paper sees a gain from reallocated memory."""
FILTERED_FROM = 1e-6
"""Least `filter_eps` of a run that counts as filtered."""
FASTER_DATASETS = {"beauty", "megamarket", "gowalla"}


def fused_savings(frame: pd.DataFrame) -> list[Finding]:
    """Claim 11: CCE and CCE- save 75 % memory and 23 % time or more against CE and CE-."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        pairs = pd.concat(
            [
                matched(_loss(group, old), _loss(group, new), _POINT, [MEMORY, TIME])
                for old, new in (("ce", "cce"), ("ce_minus", "cce_minus"))
            ]
        )
        if pairs.empty:
            return undecidable(
                11, dataset, _lacks(group, "ce with cce, or ce_minus with cce_minus")
            )
        memory = mean_estimate(-relative(pairs, MEMORY), keys_of(pairs))
        time = mean_estimate(-relative(pairs, TIME), keys_of(pairs))
        verdicts = [judge(memory, 0.75), judge(time, 0.23)]
        reason = (
            f"memory saved {percent(memory.value)}, time saved {percent(time.value)} over "
            f"{memory.count} matched settings"
        )
        return combined(11, dataset, memory, verdicts, reason)

    return _each(frame, judged)


def sampled_against_full(frame: pd.DataFrame) -> list[Finding]:
    """Claim 12: CCE- beats CCE in NDCG@10 and in time, at its best number of negatives."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        sampled = cells(_loss(group, "cce_minus"), _POINT, [NDCG, TIME])
        best = sampled.sort_values(NDCG).drop_duplicates(_SETTING, keep="last")
        full = cells(_loss(group, "cce"), _POINT, [NDCG, TIME])
        pairs = full.merge(best, on=_SETTING, suffixes=("_left", "_right"))
        if pairs.empty:
            return undecidable(12, dataset, _lacks(group, "cce with cce_minus"))
        pairs["run_keys"] = pairs["run_keys_left"] + pairs["run_keys_right"]
        quality = mean_estimate(relative(pairs, NDCG), keys_of(pairs))
        time = mean_estimate(-relative(pairs, TIME), keys_of(pairs))
        reason = f"NDCG@10 {percent(quality.value)}, time saved {percent(time.value)}"
        return combined(12, dataset, quality, [judge(quality, 0), judge(time, 0)], reason)

    return _each(frame, judged)


def filtering(frame: pd.DataFrame) -> list[Finding]:
    """Claim 13: filtering gradients up to 1e-4 costs less than one percent of NDCG@10."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        eps = numeric(group, "filter_eps")
        on = ["loss", *_POINT]
        # the claim is about leaving gradients out, not about the unbiased filter
        if "filter_mode" in group:
            group = group[group["filter_mode"] != "unbiased"]
            eps = eps[group.index]
        filtered = group[_is_filtered(group) & (eps <= 1e-4)]
        pairs = matched(group[~_is_filtered(group)], filtered, on, [NDCG])
        if pairs.empty:
            return undecidable(13, dataset, _lacks(group, "filter_eps from 1e-6 to 1e-4 and none"))
        estimate = mean_estimate(relative(pairs, NDCG), keys_of(pairs))
        threshold = 0.0 if base_name(dataset) == "movielens_20m" else -0.01
        what = "relative NDCG@10 with filter_eps of 1e-6 to 1e-4 against none or less"
        return above(13, dataset, estimate, threshold, what)

    return _each(frame, judged)


def faster_than_filtered(frame: pd.DataFrame) -> list[Finding]:
    """Claim 14: an epoch of CCE filtered at 1e-4 takes over three times that of CCE-."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        eps = numeric(group, "filter_eps")
        filtered = group[(group["loss"] == "cce") & np.isclose(eps, 1e-4, rtol=0.5)]
        pairs = matched(_loss(group, "cce_minus"), filtered, _SETTING, [TIME])
        if pairs.empty:
            return undecidable(14, dataset, _lacks(group, "cce filtered at 1e-4 with cce_minus"))
        estimate = mean_estimate(1 + relative(pairs, TIME), keys_of(pairs))
        named = base_name(dataset) in FASTER_DATASETS
        what = "epoch time of filtered CCE over CCE-" + ("" if named else "; the paper names "
                "Beauty, MegaMarket and Gowalla only")  # fmt: skip
        return above(14, dataset, estimate, 3.0, what)

    return _each(frame, judged)


def popularity(frame: pd.DataFrame) -> list[Finding]:
    """Claim 15: popularity sampling lowers NDCG@10 and raises Surprisal@10."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        sampler = group.get("negative_sampler", pd.Series("uniform", index=group.index))
        on = ["loss", *_POINT]
        columns = [NDCG, SURPRISAL, COVERAGE]
        pairs = matched(group[sampler == "uniform"], group[sampler == "popularity"], on, columns)
        if pairs.empty:
            return undecidable(15, dataset, _lacks(group, "popularity with uniform sampling"))
        quality, novelty, spread = (
            mean_estimate(sign * relative(pairs, name), keys_of(pairs))
            for name, sign in ((NDCG, -1), (SURPRISAL, 1), (COVERAGE, 1))
        )
        verdicts = [judge(quality, 0), judge(novelty, 0)]
        direction = {"beauty": 1, "gowalla": 1, "movielens_20m": -1}.get(base_name(dataset))
        if direction is not None:
            verdicts.append(judge(_signed(spread, direction), 0))
        reason = (
            f"NDCG@10 lost {percent(quality.value)}, Surprisal@10 {percent(novelty.value)}, "
            f"Coverage@10 {percent(spread.value)}"
        )
        return combined(15, dataset, quality, verdicts, reason)

    return _each(frame, judged)


def sce_surprisal(frame: pd.DataFrame) -> list[Finding]:
    """Claim 16: SCE has a higher Surprisal@10 than CCE- at equal batch size and length."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        pairs = matched(_loss(group, "cce_minus"), _loss(group, "sce"), _SETTING, [SURPRISAL])
        if pairs.empty:
            return undecidable(16, dataset, _lacks(group, "sce with cce_minus"))
        estimate = mean_estimate(relative(pairs, SURPRISAL), keys_of(pairs))
        return above(16, dataset, estimate, 0.0, "relative Surprisal@10 of SCE against CCE-")

    return _each(frame, judged)


def bce_worst(frame: pd.DataFrame) -> list[Finding]:
    """Claim 17: BCE is behind every other loss in NDCG@10 and Coverage@10."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        estimates: list[tuple[str, Estimate, Estimate]] = []
        for loss in sorted(set(group["loss"]) - {"bce"}):
            pairs = matched(_loss(group, "bce"), _loss(group, loss), _SETTING, [NDCG, COVERAGE])
            if not pairs.empty:
                gains = [mean_estimate(relative(pairs, name), keys_of(pairs))
                         for name in (NDCG, COVERAGE)]  # fmt: skip
                estimates.append((loss, gains[0], gains[1]))
        if not estimates:
            return undecidable(17, dataset, _lacks(group, "bce with another loss"))
        verdicts = [judge(item, 0.0) for _, *gains in estimates for item in gains]
        closest = min(estimates, key=lambda item: item[1].value)
        reason = f"smallest lead over BCE in NDCG@10: {closest[0]} {percent(closest[1].value)}"
        return combined(17, dataset, closest[1], verdicts, reason)

    return _each(frame, judged)


def reallocated(frame: pd.DataFrame) -> list[Finding]:
    """Claim 18: the best fused run beats the best materialised one by 5 % iff V > 800,000."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        old = _best(group, ("ce", "ce_minus"))
        new = _best(group, ("cce", "cce_minus"))
        if old is None or new is None:
            return undecidable(18, dataset, _lacks(group, "ce or ce_minus with cce or cce_minus"))
        items = numeric(group, "num_items").max()
        if not np.isfinite(items):
            return undecidable(18, dataset, "the catalog size is not known")
        gain = new[NDCG] / old[NDCG] - 1
        spread = np.hypot(_relative_error(old), _relative_error(new)) * (1 + gain)
        keys = (old["run_key"], new["run_key"])
        estimate = Estimate(gain, gain - 1.96 * spread, gain + 1.96 * spread, 1, keys)
        verdict = judge(estimate, 0.05)
        large = items > LARGE_CATALOG
        swap: dict[Verdict, Verdict] = {"supported": "contradicted", "contradicted": "supported"}
        reason = (
            f"best fused against best materialised run {percent(gain)} with {items:,.0f} items; "
            f"claimed {'above' if large else 'below'} 5 %; interval from the standard errors over "
            "users, none without them"
        )
        verdicts = [verdict if large else swap.get(verdict, verdict)]
        return combined(18, dataset, estimate, verdicts, reason)

    return _each(frame, judged)


def final_layer(frame: pd.DataFrame) -> list[Finding]:
    """Claim 19: without the logits of CE, 85 % of training memory or more is gone."""

    def judged(dataset: str, group: pd.DataFrame) -> Finding:
        pairs = matched(_loss(group, "ce"), _loss(group, "cce"), _SETTING, [MEMORY])
        if pairs.empty:
            return undecidable(19, dataset, _lacks(group, "ce with cce"))
        estimate = mean_estimate(-relative(pairs, MEMORY), keys_of(pairs))
        what = "share of CE's training memory that CCE does without"
        return above(19, dataset, estimate, 0.85, what)

    return _each(frame, judged)


def _each(frame: pd.DataFrame, judged: Callable[[str, pd.DataFrame], Finding]) -> list[Finding]:
    if "model" not in frame:
        frame = frame.assign(model="sasrec")
    frame = frame.assign(training=trainings(frame))
    return [judged(str(name), group) for name, group in frame.groupby("dataset", sort=False)]


def _loss(group: pd.DataFrame, loss: str) -> pd.DataFrame:
    """Runs of a loss without filtering and with uniform negatives; all where there are none."""
    runs = group[group["loss"] == loss]
    usual = ~_is_filtered(runs)
    if "negative_sampler" in runs:
        usual &= runs["negative_sampler"] == "uniform"
    return runs[usual] if usual.any() else runs


def _is_filtered(runs: pd.DataFrame) -> pd.Series:
    """Whether a run leaves out so many gradients that its quality or time could tell."""
    return numeric(runs, "filter_eps") >= FILTERED_FROM


def _lacks(group: pd.DataFrame, needed: str) -> str:
    there: Sequence[str] = sorted(set(group["loss"]))
    return f"needs runs of {needed} at equal settings; these are of {', '.join(there)}"


def _signed(estimate: Estimate, sign: int) -> Estimate:
    if sign > 0:
        return estimate
    return Estimate(
        -estimate.value, -estimate.high, -estimate.low, estimate.count, estimate.run_keys
    )


def _best(group: pd.DataFrame, losses: Sequence[str]) -> pd.Series | None:
    runs = group[group["loss"].isin(losses) & numeric(group, NDCG).notna()]
    return None if runs.empty else runs.iloc[int(runs[NDCG].to_numpy(float).argmax())]


def _relative_error(run: pd.Series) -> float:
    error = run.get(f"{NDCG}_se")
    return np.nan if error is None or not run[NDCG] > 0 else float(error) / float(run[NDCG])
