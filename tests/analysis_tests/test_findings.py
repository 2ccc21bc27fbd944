"""Verdicts on generated sweeps whose truth is known, in both directions."""

import numpy as np
import pandas as pd
import pytest

from analysis.claims_losses import (
    bce_worst,
    faster_than_filtered,
    filtering,
    final_layer,
    fused_savings,
    popularity,
    reallocated,
    sampled_against_full,
    sce_surprisal,
)
from analysis.claims_scaling import (
    batch_size,
    growth,
    headline,
    memory_and_quality,
    negatives,
    sequence_length,
    two_together,
)
from analysis.evidence import both, judge, mean_estimate
from analysis.findings import CLAIMS, findings
from analysis.importance import importances
from analysis.saturation import saturations

WIDE = {
    "batch_sizes": (64, 128, 256, 512),
    "lengths": (16, 32, 64, 128),
    "negatives": (16, 32, 128, 512, 1024, 2048),
}


def verdict(found, dataset="demo"):
    return next(row.verdict for row in found if row.dataset == dataset)


def memory(frame, law):
    return frame.assign(peak_train_memory_bytes=law(frame))


def test_there_are_nineteen_claims():
    assert [claim.number for claim in CLAIMS] == list(range(1, 20))


@pytest.mark.parametrize(("sign", "expected"), [(1, "supported"), (-1, "contradicted")])
def test_memory_and_quality(sweep_frame, sign, expected):
    frame = sweep_frame(**WIDE)
    frame = memory(frame, lambda f: 1e9 + sign * 1e9 * 5 * f["ndcg_at_10"])
    assert verdict(memory_and_quality(frame)) == expected


@pytest.mark.parametrize(("slope", "expected"), [(0.004, "supported"), (-0.004, "contradicted")])
def test_batch_size(sweep_frame, slope, expected):
    frame = sweep_frame(**WIDE, quality=lambda bs, sl, ns: 0.1 + slope * np.log2(bs))
    assert verdict(batch_size(frame)) == expected
    movie = frame.assign(dataset="movielens_20m")
    opposite = {"supported": "contradicted", "contradicted": "supported"}[expected]
    assert verdict(batch_size(movie), "movielens_20m") == opposite


@pytest.mark.parametrize(("slope", "expected"), [(0.004, "supported"), (-0.004, "contradicted")])
def test_sequence_length(sweep_frame, slope, expected):
    frame = sweep_frame(**WIDE, quality=lambda bs, sl, ns: 0.1 + slope * np.log2(sl))
    assert verdict(sequence_length(frame)) == expected
    small = frame[frame["batch_size"] < 256]
    assert verdict(sequence_length(small)) == "undecidable"


@pytest.mark.parametrize(("peak", "expected"), [(128, "supported"), (2048, "contradicted")])
def test_negatives(sweep_frame, peak, expected):
    frame = sweep_frame(
        **{**WIDE, "negatives": (*WIDE["negatives"], None)},
        quality=lambda bs, sl, ns: 0.1 - 0.005 * abs(np.log2(ns / peak)),
    )
    assert verdict(negatives(frame)) == expected
    no_full = frame.dropna(subset=["num_negatives"])
    assert verdict(negatives(no_full)) == ("undecidable" if peak == 128 else "contradicted")


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (lambda bs, sl, ns: 0.001 * np.log2(bs) * np.log2(sl) * np.log2(ns), "supported"),
        (lambda bs, sl, ns: 1e-9 * (bs**3 + sl**3 + ns**3), "contradicted"),
    ],
)
def test_two_together(sweep_frame, law, expected):
    frame = sweep_frame(
        batch_sizes=(64, 128, 256, 512), lengths=(64, 128, 256, 512),
        negatives=(64, 128, 256, 512), quality=law, noise=0.0,
    )  # fmt: skip
    assert verdict(two_together(frame)) == expected


@pytest.mark.parametrize(("sign", "expected"), [(-1, "supported"), (1, "undecidable")])
def test_headline(sweep_frame, sign, expected):
    frame = sweep_frame(
        **WIDE, noise=0.0, quality=lambda bs, sl, ns: 0.2 + sign * 0.01 * np.log2(ns)
    )
    frame = memory(frame, lambda f: 1e9 + 1e6 * f["num_negatives"])
    found = verdict(headline(frame))
    assert found == ("contradicted" if expected == "undecidable" else expected)


@pytest.mark.parametrize(
    ("law", "grows"),
    [
        (lambda f: 0.02 * np.log2(f["peak_train_memory_bytes"] / 1e8), "supported"),
        (lambda f: np.minimum(0.1, f["peak_train_memory_bytes"] / 1e10), "contradicted"),
    ],
)
def test_growth_and_saturation(sweep_frame, law, grows):
    frame = memory(sweep_frame(**WIDE), lambda f: np.geomspace(2e8, 2e10, len(f)))
    frame = frame.assign(ndcg_at_10=law(frame))
    assert verdict(growth(frame)) == grows
    beauty = frame.assign(dataset="beauty")
    opposite = {"supported": "contradicted", "contradicted": "supported"}[grows]
    assert verdict(growth(beauty), "beauty") == opposite
    point = saturations(frame)[0]
    assert point.point_low <= point.point <= point.point_high
    if grows == "contradicted":
        assert point.point == pytest.approx(1e9, rel=0.1)


def loss_pair(sweep_frame, old, new, **factors) -> pd.DataFrame:
    """The same points under two losses, measures of the second scaled."""
    base = sweep_frame(**WIDE, noise=0.0)
    if old in {"ce", "cce", "bce", "sce"}:
        base = base[base["num_negatives"] == 16].assign(num_negatives=np.nan)
    first = base.assign(loss=old)
    second = base.assign(loss=new, run_key=["f" + key[1:] for key in base["run_key"]])
    second = second.assign(**{name: base[name] * factor for name, factor in factors.items()})
    return pd.concat([first, second], ignore_index=True)


MEM, TIME, NDCG = "peak_train_memory_bytes", "epoch_seconds", "ndcg_at_10"
COVERAGE, SURPRISAL = "coverage_at_10", "surprisal_at_10"


@pytest.mark.parametrize(
    ("claim", "pair", "yes", "no"),
    [
        (fused_savings, ("ce", "cce"), {MEM: 0.1, TIME: 0.5}, {MEM: 0.5, TIME: 0.5}),
        (fused_savings, ("ce_minus", "cce_minus"), {MEM: 0.1, TIME: 0.5}, {MEM: 0.1, TIME: 0.9}),
        (final_layer, ("ce", "cce"), {MEM: 0.1}, {MEM: 0.5}),
        (sampled_against_full, ("cce", "cce_minus"), {NDCG: 1.1, TIME: 0.5}, {NDCG: 0.9}),
        (sce_surprisal, ("cce_minus", "sce"), {SURPRISAL: 1.1}, {SURPRISAL: 0.9}),
        (bce_worst, ("bce", "gbce"), {NDCG: 2, COVERAGE: 2}, {NDCG: 0.5, COVERAGE: 2}),
    ],
)
def test_claims_about_losses(sweep_frame, claim, pair, yes, no):
    assert verdict(claim(loss_pair(sweep_frame, *pair, **yes))) == "supported"
    assert verdict(claim(loss_pair(sweep_frame, *pair, **no))) == "contradicted"
    special = loss_pair(sweep_frame, *pair, **no).query(f"loss == '{pair[1]}'")
    for name, value in (("filter_eps", 1e-4), ("negative_sampler", "popularity")):
        usual = loss_pair(sweep_frame, *pair, **yes)
        usual[name] = np.nan if name == "filter_eps" else "uniform"
        beside = special.assign(run_key=special["run_key"] + name, **{name: value})
        assert claim(pd.concat([usual, beside], ignore_index=True)) == claim(usual)
    alone = loss_pair(sweep_frame, *pair).query(f"loss == '{pair[0]}'")
    lacking = claim(alone)[0]
    assert lacking.verdict == "undecidable"
    assert lacking.reason.startswith("needs runs of")


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "supported"), (0.9, "contradicted")])
def test_filtering(sweep_frame, factor, expected):
    frame = loss_pair(sweep_frame, "cce", "cce", **{NDCG: factor})
    frame["filter_eps"] = np.where(frame["run_key"].str.startswith("f"), 1e-5, np.nan)
    assert verdict(filtering(frame)) == expected


@pytest.mark.parametrize(("factor", "expected"), [(4.0, "supported"), (2.0, "contradicted")])
def test_faster_than_filtered(sweep_frame, factor, expected):
    frame = loss_pair(sweep_frame, "cce_minus", "cce", **{TIME: factor})
    frame["filter_eps"] = np.where(frame["loss"] == "cce", 1e-4, np.nan)
    assert verdict(faster_than_filtered(frame)) == expected


@pytest.mark.parametrize(("factor", "expected"), [(0.8, "supported"), (1.2, "contradicted")])
def test_popularity(sweep_frame, factor, expected):
    frame = loss_pair(sweep_frame, "cce_minus", "cce_minus", **{NDCG: factor, SURPRISAL: 1.2})
    second = frame["run_key"].str.startswith("f")
    frame["negative_sampler"] = np.where(second, "popularity", "uniform")
    assert verdict(popularity(frame)) == expected


@pytest.mark.parametrize(
    ("items", "factor", "expected"),
    [(1e6, 1.3, "supported"), (1e6, 1.0, "contradicted"), (1e4, 1.3, "contradicted")],
)
def test_reallocated_memory(sweep_frame, items, factor, expected):
    frame = loss_pair(sweep_frame, "ce", "cce", **{NDCG: factor})
    frame = frame.assign(num_items=items, ndcg_at_10_se=1e-4)
    assert verdict(reallocated(frame)) == expected
    assert verdict(reallocated(frame.drop(columns="ndcg_at_10_se"))) == "undecidable"


def test_all_claims_on_a_small_sweep_say_why_they_are_open(sweep_frame):
    frame = sweep_frame()
    weighed = importances(frame, metrics=["ndcg_at_10"], repeats=1, permutations=1)
    found = findings(frame, weighed)
    table = found.texts_frame()
    assert set(table["claim"]) == set(range(1, 20))
    assert table.loc[table["verdict"] == "undecidable", "reason"].str.len().min() > 5
    known = set(frame["run_key"])
    assert set(found.runs_frame()["run_key"]) <= known
    assert list(found.to_frame()) == ["claim", "dataset", "verdict", "value", "low", "high", "n"]


def test_few_comparisons_decide_nothing():
    estimate = mean_estimate([1.0, 1.1, 0.9], [])
    assert judge(estimate, 0.0) == "undecidable"
    assert judge(mean_estimate([1.0, 1.1, 0.9, 1.0], []), 0.0) == "supported"
    assert both(["supported", "undecidable"]) == "undecidable"
    assert both(["undecidable", "contradicted"]) == "contradicted"
